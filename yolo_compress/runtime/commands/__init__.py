"""The commands of a bundle: build, bench, detect, switch, and the ROS 2 node."""
