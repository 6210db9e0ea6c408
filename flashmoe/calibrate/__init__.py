"""Machines that are measured: the host, for as long as the process lives; a GPU, into a machine file."""

from flashmoe.calibrate.host import host_machine, num_cores

__all__ = ["host_machine", "num_cores"]
