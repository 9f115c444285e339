"""Asking what-if questions: the same workload under several option sets."""
