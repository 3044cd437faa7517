"""Configuration for the programs that can run the detector on the robot: Triton, DeepStream, Isaac ROS. One module for each."""
