"""Programs that run the detector on the robot, one file each: Triton, DeepStream, Isaac ROS."""
