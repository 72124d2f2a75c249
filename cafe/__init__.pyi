from cafe.data.expressions import EXPRESSIONS as EXPRESSIONS
from cafe.inference.model import Model as Model
from cafe.pipeline.release.library import compare as compare
from cafe.pipeline.release.library import extract as extract
from cafe.pipeline.release.library import load_manifest as load_manifest
from cafe.pipeline.release.library import load_model as load_model
from cafe.pipeline.release.library import load_store as load_store
from cafe.pipeline.release.library import scores as scores
from cafe.pipeline.release.library import train as train
from cafe.pipeline.release.prediction import predict as predict

__version__: str
