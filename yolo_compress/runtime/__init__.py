"""Code that runs on the robot. It needs Python 3.8, numpy and an engine library, but no other part of the package."""
