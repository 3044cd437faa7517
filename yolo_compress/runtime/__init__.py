"""Code that runs on the robot. It needs only numpy and an engine library, no other part of the package, and Python 3.8."""
