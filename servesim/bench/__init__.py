"""How right the simulator is: logs of real schedulers and recordings of real servers to compare with."""
