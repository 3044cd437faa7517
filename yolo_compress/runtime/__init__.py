"""What runs on the robot: numpy, one engine library and this folder; nothing else of the package, Python 3.8 syntax."""
