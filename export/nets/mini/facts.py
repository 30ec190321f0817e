"""Sizes and settings that the graphs, the torch modules and the trainings of the built-in model share."""

from calmclip.models.bundle.manifest import ImagePreprocess

WIDTH = 384  # of a vector, and of MiniLM
LAYERS, HEADS, INNER, VOCABULARY = 6, 12, 1536, 30522  # of MiniLM
E5_LAYERS = 12  # of the encoder of many languages
CONTEXT = 256  # tokens; the weights hold 512 positions, but were trained as a sentence encoder on at most 256
WIDTH16, WIDTH32, CLASSES = 120, 1280, 1000  # of the backbone's maps at strides 16 and 32, and of its classifier
FEATURE_LENGTH = 6.0  # of z; c has length 1 in the same product
PIXELS = ImagePreprocess(
    size=(260, 260), resize="shortest", shortest=292, keep_square=True, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)  # (x - 127) / 128; the package's own page names ImageNet's mean and deviation, which cost 10 points of accuracy
TEMPLATES = ("a photo of a {}.", "a {}", "a picture of a {}.", "a close-up photo of a {}.", "a {} in the scene.")
# The stem and the first block stay in float: their outputs reach 100 before ReLU6 clips them to 6, so one step of 8
# bits in front of a weight of 13 is large. No rounding of weights helps against that; README.md has the figures.
QUANTIZE = {"keep": ["Conv.Conv_0", "Conv.Conv_1", "Conv.Conv_2"]}
# NanoDet's first convolution, for the same reason, and the box quality, which is no hundredth of the work.
QUANTIZE_REGIONS = {"keep": [*QUANTIZE["keep"], "Conv.Conv_64", "MatMul.MatMul_4", "MatMul.MatMul_5"]}

SIDE = 416  # pixels of the letterboxed picture's sides
STRIDES = (8, 16, 32)  # of NanoDet's grids
CELLS = SIDE // 32  # rows and columns of the backbone's last map of it
FINE_CELLS = SIDE // 8  # of the features of masks
PROPOSALS = 100
MASK_WIDTH = 32  # channels of the features of masks, at stride 8
SAMPLES = 16  # rows and columns of a mask
MARGIN = 0.1  # of a box's sides, around it, that its mask covers, too
REGION_PIXELS = ImagePreprocess(
    size=(SIDE, SIDE), resize="letterbox", pad=127, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)  # (x - 127) / 128; the backbone reads the margin as 0
# What NanoDet was trained to name, in its order: COCO's 80 classes (Lin et al. 2014, arXiv 1405.0312).
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
)  # fmt: skip
BACKGROUND = (
    "the sky",
    "grass",
    "a wall",
    "the floor",
    "the ground",
    "trees",
    "water",
    "a road",
    "a building",
    "a blurry background",
    "texture",
    "part of something",
)
