"""What the gateway tells about itself: logs, metrics, traces.

metrics, telemetry = GatewayMetrics(), make_telemetry(os.environ)
app = RequestMiddleware(app, metrics=metrics, telemetry=telemetry)
relay = Relay(..., observe=GenerationWatch(metrics, telemetry).begun)
"""

from gorgon_gateway.observability.generations import GenerationWatch
from gorgon_gateway.observability.logs import configure_logs, logger
from gorgon_gateway.observability.metrics import CONTENT_TYPE, GatewayMetrics
from gorgon_gateway.observability.middleware import REQUEST_ID_HEADER, RequestMiddleware, RequestRecord, record_of
from gorgon_gateway.observability.tracing import Telemetry, make_telemetry, outgoing_headers

__all__ = [
    "CONTENT_TYPE",
    "REQUEST_ID_HEADER",
    "GatewayMetrics",
    "GenerationWatch",
    "RequestMiddleware",
    "RequestRecord",
    "Telemetry",
    "configure_logs",
    "logger",
    "make_telemetry",
    "outgoing_headers",
    "record_of",
]
