"""Benchmarks of fastnn against its peers: ``python -m benchmarks --help``.

One runner serves all operators. Each thread count has a process, in which all contenders of a case
take turns sample by sample, so that disturbances on the machine hit all of them alike.
"""
