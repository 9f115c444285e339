"""An emulated vLLM: a server whose engine is the simulation, on a clock that follows the clients."""
