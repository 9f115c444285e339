"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const marks = ["circle", "triangle", "rect", "rectRot", "cross", "star", "crossRot", "dash"];
  const dashes = [[], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [12, 4], [4, 4, 1, 4], [3, 6]];
  const number = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && size < 0.001) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 21 : 4, maximumFractionDigits: size >= 1000 ? 0 : 6 });
  };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function dataset(chart, series, at) {
    const tone = color("--c" + (at % 8));
    const line = chart.kind === "line" || chart.kind === "step";
    const data = chart.categories ? series.y : series.x.map((x, i) => ({ x, y: series.y[i], label: series.labels && series.labels[i] }));
    return {
      label: series.name, data, borderColor: tone, backgroundColor: chart.kind === "bar" ? tone : tone + "99",
      borderWidth: line ? 2 : chart.kind === "bar" ? 0 : 1, borderDash: line ? dashes[at % 8] : [], stepped: chart.kind === "step" ? "after" : false,
      pointRadius: line ? (data.length <= 40 ? 3 : 0) : (data.length > 600 ? 2 : 4), pointHitRadius: 6, pointStyle: marks[at % 8],
      tension: 0, spanGaps: true,
    };
  }

  // a little room around dots, so that none lies on the frame
  function limits(chart, along) {
    const values = chart.series.flatMap((series) => series[along]);
    const least = values.reduce((a, b) => Math.min(a, b), Infinity), most = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const room = 0.05 * (most - least || Math.abs(most) || 1);
    return { suggestedMin: least >= 0 ? Math.max(0, least - room) : least - room, suggestedMax: most + room };
  }

  function axis(title, log, stacked, around) {
    return {
      ...(around && !log ? around : {}),
      type: log ? "logarithmic" : "linear", stacked, title: { display: true, text: title, color: color("--dim") },
      ticks: { color: color("--dim"), maxTicksLimit: 8, callback: (value) => number(value) }, grid: { color: color("--line") },
    };
  }

  function configuration(chart) {
    const types = { line: "line", step: "line", scatter: "scatter", bar: "bar" };
    const dots = chart.kind === "scatter";
    const scales = {
      x: axis(chart.x, chart.x_log, false, dots && limits(chart, "x")),
      y: axis(chart.y, chart.y_log, chart.kind === "bar", dots && limits(chart, "y")),
    };
    if (chart.categories) {
      const along = chart.kind === "bar" ? "y" : "x";
      scales[along] = { stacked: true, ticks: { color: color("--text"), autoSkip: false }, grid: { display: false } };
      scales[along === "y" ? "x" : "y"] = axis(chart.y, chart.y_log, true, false);
    }
    return {
      type: types[chart.kind],
      data: { labels: chart.categories || undefined, datasets: chart.series.map((series, at) => dataset(chart, series, at)) },
      options: {
        indexAxis: chart.categories && chart.kind === "bar" ? "y" : "x", parsing: chart.categories ? undefined : false,
        normalized: chart.kind === "line" || chart.kind === "step", animation: false, responsive: true, maintainAspectRatio: false, scales,
        interaction: { mode: chart.kind === "scatter" ? "nearest" : "index", intersect: chart.kind === "scatter", axis: "x" },
        plugins: {
          legend: { display: chart.series.length > 1, labels: { color: color("--text"), usePointStyle: true, boxWidth: 10 } },
          tooltip: {
            callbacks: {
              title: (items) => chart.categories ? items[0].label : (items[0].raw.label || chart.x + " " + number(items[0].parsed.x)),
              label: (item) => {
                const value = chart.categories ? item.raw : item.parsed.y;
                const where = chart.kind === "scatter" ? number(item.parsed.x) + " → " : "";
                return (chart.series.length > 1 ? item.dataset.label + ": " : "") + where + number(value);
              },
            },
          },
        },
      },
    };
  }

  let drawn = [];
  function draw() {
    drawn.forEach((chart) => chart.destroy());
    drawn = charts.map((chart, at) => new Chart(document.getElementById("chart-" + at), configuration(chart)));
    document.documentElement.dataset.drawn = drawn.length;
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
