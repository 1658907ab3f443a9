"""Sampling from the demo's model; the demo command fills in the run's folder."""

num_frames = 4
frame_interval = 2
fps = 24
image_size = (144, 256)
multi_resolution = "STDiT2"

vae = dict(type="linear")
text_encoder = dict(type="bytes", model_max_length=96)
scheduler = dict(type="iddpm", num_sampling_steps=50, cfg_scale=1.5)
dtype = "fp32"
cpu_threads = 1  # as in demo.py

seed = 42
