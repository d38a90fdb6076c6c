"""Benchmarks of fastnn against its peers: ``python -m benchmarks --help``.

One runner for all operators. Every case is measured in one process per thread count, all contenders
taking turns sample by sample, so that what else happens on the machine hits all of them alike.
"""
