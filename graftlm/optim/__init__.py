"""OPTIMIZERS: the table of what updates parameters. A new optimizer is its file, its line here, and its test."""

from graftlm.optim.adalomo import AdaLomo, AdaLomoConfig
from graftlm.optim.adamw import AdamW, AdamWConfig
from graftlm.optim.adamw_8bit import AdamW8bit, AdamW8bitConfig
from graftlm.optim.coap import Coap, CoapConfig
from graftlm.optim.flora_compression import FloraCompression, FloraCompressionConfig
from graftlm.optim.galore import Galore, GaloreConfig
from graftlm.optim.lomo import Lomo, LomoConfig
from graftlm.optim.schedule_free import ScheduleFree, ScheduleFreeConfig
from graftlm.optim.sm3 import Sm3, Sm3Config
from graftlm.training.callback import CallbackRow as Row

OPTIMIZERS: dict[str, Row] = {
    "adalomo": Row(AdaLomoConfig, AdaLomo),
    "adamw": Row(AdamWConfig, AdamW),
    "adamw-8bit": Row(AdamW8bitConfig, AdamW8bit),
    "coap": Row(CoapConfig, Coap),
    "flora-compression": Row(FloraCompressionConfig, FloraCompression),
    "galore": Row(GaloreConfig, Galore),
    "lomo": Row(LomoConfig, Lomo),
    "schedule-free": Row(ScheduleFreeConfig, ScheduleFree),
    "sm3": Row(Sm3Config, Sm3),
}
