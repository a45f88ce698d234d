"""DynaBERT: BERT-family encoders whose width and depth are chosen per call.

Importing this package registers the models with `transformers`, so that ``AutoModel`` and pipelines
load a DynaBERT directory.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.extraction import extract
from dynabert.importance import Importance, compute_importance
from dynabert.modeling_dynabert import DynaBertModel
from dynabert.modeling_heads import (
    DynaBertForMaskedLM,
    DynaBertForQuestionAnswering,
    DynaBertForSequenceClassification,
    DynaBertForTokenClassification,
)
from dynabert.rewiring import rewire
from dynabert.rewiring_record import RewiringRecord
from dynabert.subnet import ForEach, SubnetConfig, SubnetShape, subnet_grid

AutoConfig.register(DynaBertConfig.model_type, DynaBertConfig, exist_ok=True)
AutoModel.register(DynaBertConfig, DynaBertModel, exist_ok=True)
AutoModelForMaskedLM.register(DynaBertConfig, DynaBertForMaskedLM, exist_ok=True)
AutoModelForQuestionAnswering.register(DynaBertConfig, DynaBertForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(
    DynaBertConfig, DynaBertForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    DynaBertConfig, DynaBertForTokenClassification, exist_ok=True
)

__all__ = [
    "DynaBertConfig",
    "DynaBertForMaskedLM",
    "DynaBertForQuestionAnswering",
    "DynaBertForSequenceClassification",
    "DynaBertForTokenClassification",
    "DynaBertModel",
    "ForEach",
    "Importance",
    "RewiringRecord",
    "SubnetConfig",
    "SubnetShape",
    "compute_importance",
    "extract",
    "rewire",
    "subnet_grid",
]
