"""One file a way to run the detector on the robot: Triton, DeepStream, Isaac ROS."""
