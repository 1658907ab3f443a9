"""Images only, at five resolutions."""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path META
    frame_interval=3,
    transform_name="resize_crop",
)

# resolution: {frames: (probability that a clip is kept, batch size)}
bucket_config = {
    "256": {1: (1.0, 256)},
    "512": {1: (1.0, 80)},
    "480p": {1: (1.0, 52)},
    "1024": {1: (1.0, 20)},
    "1080p": {1: (1.0, 8)},
}
mask_ratios = None

model = dict(
    type="STDiT2-XL/2",
    from_pretrained=None,
    input_sq_size=512,
    qk_norm=True,
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=200,
)
scheduler = dict(
    type="iddpm",
    timestep_respacing="",
)

dtype = "bf16"
grad_checkpoint = True
plugin = "zero2"  # as published; one process needs none
num_workers = 4

seed = 42
epochs = 1000
log_every = 10
ckpt_every = 500
lr = 2e-05
grad_clip = 1.0
