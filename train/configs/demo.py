"""The demo: a small ST-DiT-2 (head size 72, as the large one) on real clips, in about two minutes on two CPU cores."""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,
    frame_interval=2,
    transform_name="resize_crop",
)
bucket_config = {
    "144p": {1: (1.0, 4), 4: (1.0, 1)},
    "256": {1: (0.3, 2), 8: (0.15, 1)},
}
mask_ratios = {
    "mask_no": 0.6,
    "mask_image_head": 0.3,
    "mask_image_random": 0.1,
}

dtype = "fp32"
grad_checkpoint = False

model = dict(
    type="STDiT2",
    hidden_size=144,
    num_heads=2,
    depth=3,
    input_sq_size=256,
    qk_norm=True,
)
vae = dict(type="linear")
text_encoder = dict(type="bytes", model_max_length=96)
scheduler = dict(type="iddpm")

# Operations of so small a model end before a second thread has begun: on a busy machine waiting for it costs four times
# the work.
cpu_threads = 1
seed = 42
epochs = 1000
steps = 500
log_every = 10
ckpt_every = 100
lr = 1e-3
grad_clip = 1.0
# The average of so short a run has to follow quickly.
ema_decay = 0.99
# Every clip counts in so small a set: a bucket's last batch is filled up from its own clips.
drop_last = False
