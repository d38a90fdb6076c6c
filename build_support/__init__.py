"""What setup.py and the tests of the build share; no part of the installed package."""
