"""The diorama: a tiny rendered world with its own English, from which a tiny text-to-video model learns.

scene    what can be shown: seven named attributes, six unnamed variables
prompts  scenes to English and back
render   scenes to frames (needs OpenCV); motion, backdrop, subject, weather, palette and canvas are its parts
probe    frames back to attributes: a small classifier, trained by train_probe
"""
