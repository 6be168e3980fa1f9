"""From the name of a data set to batches on the device."""

import os

# The most pixels of an image. A header may claim any number; no real photograph has as many. OpenCV
# reads the variable when it is loaded, so this has to come first.
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(2**27)
