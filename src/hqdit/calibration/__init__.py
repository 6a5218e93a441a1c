"""Calibration data and the capture of layer inputs."""
