"""Judging what loading a configuration of Keras would run, import or reach: by name, nothing is looked up.

Keras makes an object of every ``{"module", "class_name", "config"}`` in a configuration, wherever it lies, and takes
functions by name: of its own modules any, older versions of every module there is. So a name is known only where it
is one of the lists below; that its module begins with ``keras`` or ``tensorflow`` is not enough.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bntool.checkpoints.checkpoint import GlobalName, GlobalTrust
from bntool.checkpoints.containers.pickles.trust import judge_global

# layers of Keras 1 to 3 that compute, and neither run code, nor read or write files
_LAYERS = """
Activation ActivityRegularization Add AdditiveAttention AlphaDropout Attention AugMix AutoContrast Average
BatchNormalization BatchNormalizationV1 BatchNormalizationV2 SyncBatchNormalization Bidirectional CategoryEncoding
CenterCrop Concatenate ContrastLimitedAdaptiveHistogramEqualization ConvLSTM1D ConvLSTM2D ConvLSTM3D ConvLSTM2DCell
CutMix CuDNNGRU CuDNNLSTM Dense DenseFeatures DepthwiseConv1D DepthwiseConv2D Discretization Dot Dropout ELU
EinsumDense Embedding Equalization Flatten GRU GRUCell GRUV1 GRUV2 GaussianDropout GaussianNoise GroupNormalization
GroupQueryAttention HashedCrossing Hashing Highway Identity InputLayer InputSpec LSTM LSTMCell LSTMV1 LSTMV2 Layer
LayerNormalization LeakyReLU LocallyConnected1D LocallyConnected2D Masking MaxNumBoundingBoxes Maximum MaxoutDense
MelSpectrogram Merge Minimum MixUp MultiHeadAttention Multiply Normalization PReLU ParametricSoftplus Permute
Pipeline RMSNormalization RNN RandAugment ReLU RepeatVector Rescaling Reshape Resizing ReversibleEmbedding
STFTSpectrogram SReLU SimpleRNN SimpleRNNCell SlicingOpLambda Softmax Solarization SpectralNormalization
StackedRNNCells Subtract ThresholdedReLU TimeDistributed TimeDistributedDense UnitNormalization Wrapper
AtrousConvolution1D AtrousConvolution2D AtrousConv2D Deconvolution2D Deconvolution3D
"""
_LAYER_FAMILIES = re.compile(
    r"(Conv|Convolution|DepthwiseConv|SeparableConv|SeparableConvolution)[123]D(Transpose)?"
    r"|(Adaptive|Global)?(Average|Max|Avg)(Pool|Pooling)[123]D|(Cropping|UpSampling|ZeroPadding|SpatialDropout)[123]D"
    r"|Random[A-Z][A-Za-z]+"
)
# layers that take a list of words, or the name of a file with one
_LOOKUPS = ("StringLookup", "IntegerLookup", "TextVectorization", "IndexLookup")
_RUNNING = ("TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer")  # programs that the file holds or names
_MODELS = ("Functional", "Model", "Sequential", "Graph")
# initializers, regularizers, optimizers, losses, metrics and the like, of all versions
_PARTS = """
Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity IdentityInitializer LecunNormal LecunUniform Ones
Orthogonal OrthogonalInitializer RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros Zero One
L1 L1L2 L2 OrthogonalRegularizer WeightRegularizer ActivityRegularizer MaxNorm MinMaxNorm NonNeg UnitNorm
Adadelta Adafactor Adagrad Adam AdamW Adamax Ftrl Lamb Lion LossScaleOptimizer Muon Nadam RMSprop SGD TFOptimizer
Optimizer BinaryFocalCrossentropy CTC CategoricalHinge CosineSimilarity Dice Hinge Huber KLDivergence LogCosh
MeanAbsoluteError MeanAbsolutePercentageError MeanSquaredError MeanSquaredLogarithmicError Poisson SquaredHinge
Tversky AUC Accuracy BinaryAccuracy BinaryIoU CategoricalAccuracy F1Score FBetaScore FalseNegatives FalsePositives
IoU LogCoshError Mean MeanIoU MeanMetricWrapper MeanRelativeError OneHotIoU OneHotMeanIoU Precision
PrecisionAtRecall R2Score Recall RecallAtPrecision RootMeanSquaredError SensitivityAtSpecificity
SparseCategoricalAccuracy SparseTopKCategoricalAccuracy SpecificityAtSensitivity Sum TopKCategoricalAccuracy
TrueNegatives TruePositives CosineProximity DynamicLossScale FixedLossScale MultiOptimizer SeedGenerator
"""
# areas of Keras whose classes and functions build data and compute
_AREAS = (
    *("activations", "constraints", "initializers", "losses", "metrics", "ops", "optimizers", "quantizers", "random"),
    *("regularizers", "dtype_policies", "mixed_precision", "schedules"),
)
_AREAS_OF_TENSORFLOW = (
    *("bitwise", "dtypes", "image", "linalg", "math", "nn", "quantization", "ragged", "random", "sets", "signal"),
    *("sparse", "strings"),
)
_TAKES_ANYTHING = ("deserialize", "get", "from_config")  # makes an object of a configuration that it is called with
# operations of TensorFlow, by their names in its API, that run code, or read or write files
_ACTING = re.compile(
    r"(^|\.)(io|raw_ops|py_func|py_function|numpy_function|load_library|load_op_library|saved_model)\b"
)
_CONSTANTS = (
    *("__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__", "__tuple__"),
    *("TypeSpec", "TensorShape", "__complex__"),
)


def judge_configuration(config: Any) -> Iterator[GlobalName]:
    """Yield what is named anywhere in a configuration and is not known to be harmless, each once.

    Args:
        config: JSON: of a model, or of how it is trained.
    """
    seen: dict[str, GlobalTrust] = {}
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += reversed(value)
        elif isinstance(value, dict):
            waiting += reversed(value.values())
            for path, trust in _judge_object(value):
                if seen.get(path) is not GlobalTrust.SUSPICIOUS:
                    seen[path] = trust
    for path, trust in seen.items():
        yield GlobalName(path, called=True, trust=trust)


def _judge_object(value: Mapping[str, Any]) -> Iterator[tuple[str, GlobalTrust]]:
    class_name, config = value.get("class_name"), value.get("config")
    module, registered = value.get("module", "keras.layers"), value.get("registered_name")
    if not isinstance(class_name, str) or class_name in _CONSTANTS:
        return
    settings = config if isinstance(config, dict) else {}
    if class_name == "__typespec__":  # Keras imports the module, and calls _deserialize of the class
        yield from _judge_type_spec(value)
    elif class_name == "__lambda__":
        yield "keras.layers.Lambda", GlobalTrust.SUSPICIOUS
    elif isinstance(registered, str) and registered not in ("", class_name, config):
        yield registered, GlobalTrust.UNKNOWN
    elif not isinstance(module, str):
        yield class_name, GlobalTrust.UNKNOWN  # registered by code of the user's
    elif class_name == "function" or isinstance(config, str):
        yield from _judge_name(module, config if isinstance(config, str) else class_name)
    elif "module" not in value:
        yield from _judge_old(class_name, settings)
    else:
        yield from _judge_name(module, class_name)
        yield from _judge_layer(class_name, settings)


def _judge_type_spec(value: Mapping[str, Any]) -> Iterator[tuple[str, GlobalTrust]]:
    module, name = value.get("module"), value.get("spec_name")
    is_known = isinstance(module, str) and module.split(".")[0] == "tensorflow" and str(name).endswith("Spec")
    if not is_known:
        yield from _judge_name(str(module), str(name))


def _judge_old(class_name: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, GlobalTrust]]:
    """Judge a layer of Keras 1 or 2, which write the class alone and look it up among Keras's own and what the user
    gives.
    """
    yield from _judge_layer(class_name, settings)
    if class_name.startswith(("Custom>", "Keras>")) and _is_part(class_name.partition(">")[2]):
        return  # as Keras 2 registered its own optimizers
    if ">" in class_name or not (_is_layer(class_name) or class_name in _MODELS or _is_part(class_name)):
        yield class_name, GlobalTrust.UNKNOWN


def _is_layer(name: str) -> bool:
    return (
        name in _LAYERS.split()
        or name in _LOOKUPS
        or name in ("Lambda", "TFOpLambda")
        or bool(_LAYER_FAMILIES.fullmatch(name))
    )


def _is_part(name: str) -> bool:
    return name in _PARTS.split() or name.endswith(("Decay", "DecayRestarts", "crossentropy", "Crossentropy", "Policy"))


def _judge_name(module: str, name: str) -> Iterator[tuple[str, GlobalTrust]]:
    """Judge a class or function by its module: functions are called with tensors, classes with what the file says."""
    package, *parts = (part for part in module.split(".") if part not in ("src", "_tf_keras", "api", "python"))
    if package == "tensorflow" and parts[:1] == ["keras"]:
        package, *parts = parts
    if package in ("keras", "tf_keras"):
        trust = _judge_name_of_keras(parts, name)
    elif package == "tensorflow":
        trust = _judge_name_of_tensorflow(".".join((*parts, name)))
    elif package == "builtins":  # Keras looks functions up there too
        trust = GlobalTrust.SUSPICIOUS if hasattr(builtins, name) else GlobalTrust.KNOWN
    elif judge_global(f"{module}.{name}") is GlobalTrust.SUSPICIOUS:  # os.system, which a pickle may name, too
        trust = GlobalTrust.SUSPICIOUS
    else:
        trust = GlobalTrust.UNKNOWN
    if trust is not GlobalTrust.KNOWN:
        yield f"{module}.{name}", trust


def _judge_name_of_keras(parts: Sequence[str], name: str) -> GlobalTrust:
    area = parts[0] if parts else ""
    if name in _RUNNING:
        return GlobalTrust.SUSPICIOUS
    if area in ("", "models", "engine", "legacy", "layers") and (name in _MODELS or _is_layer(name) or _is_part(name)):
        return GlobalTrust.KNOWN  # what fields of layers say is judged apart
    if area == "layers" and name[:1].isupper():
        return GlobalTrust.UNKNOWN
    if area in _AREAS and name not in _TAKES_ANYTHING and not name.startswith("set_"):  # which sets it for all models
        return GlobalTrust.KNOWN
    if area == "backend" and "optimizers" in parts and _is_part(name):
        return GlobalTrust.KNOWN
    return GlobalTrust.SUSPICIOUS  # such as utils.get_file and config.enable_unsafe_deserialization


def _judge_name_of_tensorflow(name: str) -> GlobalTrust:
    """Judge an operation or class by its name in the API, as ``math.add``; some layers of Keras 2 give that alone."""
    if _ACTING.search(name):
        return GlobalTrust.SUSPICIOUS
    area = name.partition(".")[0]
    return GlobalTrust.KNOWN if area in _AREAS_OF_TENSORFLOW or name.endswith("Spec") else GlobalTrust.UNKNOWN


def _judge_layer(class_name: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, GlobalTrust]]:
    """Yield what the fields of a layer reach, beside the objects in them."""
    if class_name in _RUNNING:
        yield f"keras.layers.{class_name}", GlobalTrust.SUSPICIOUS
    elif class_name == "Lambda":
        yield from _judge_lambda(settings)
    elif class_name == "TFOpLambda":
        function = str(settings.get("function"))
        trust = _judge_name_of_tensorflow(function)
        if trust is not GlobalTrust.KNOWN and (trust is GlobalTrust.SUSPICIOUS or "." in function):
            yield f"tensorflow.{function}", trust  # at the top of TensorFlow's API are reshape, concat and the like
    elif class_name in _LOOKUPS:
        for name in ("vocabulary", "idf_weights"):
            if isinstance(settings.get(name), str):
                yield f"keras.layers.{class_name} ({name} from a file)", GlobalTrust.SUSPICIOUS


def _judge_lambda(settings: Mapping[str, Any]) -> Iterator[tuple[str, GlobalTrust]]:
    """Judge each function of a Lambda that may be kept as code: as a list with it, or as a text of which another field
    says so.
    """
    for name in ("function", "output_shape", "mask"):
        value, kind = settings.get(name), settings.get(f"{name}_type")
        is_code = isinstance(value, list) and any(isinstance(part, str) for part in value)
        if kind == "lambda" or (is_code and value):
            yield "keras.layers.Lambda", GlobalTrust.SUSPICIOUS
        elif isinstance(value, str):
            yield f"{settings.get('module') or 'keras.layers.Lambda'}.{value}", GlobalTrust.UNKNOWN
