"""The page of `mmaccel app`: what the rooms can do, in a browser, on the pocket models or on checkpoints of yours."""
