"""What is measured and with which networks, in the order of tables; needs nothing, so that a command line can list it."""

METRICS = ("psnr", "ssim", "lpips", "temporal_psnr", "vmaf")
LPIPS_NETS = ("alex", "vgg", "none")
