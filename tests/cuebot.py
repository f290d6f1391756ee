"""A stand-in for OpenCue's Cuebot, for one RQD: takes its reports, gives it frames, kills them.

    .rqd/bin/python tests/cuebot.py PORT_OF_CUEBOT PORT_OF_RQD

Run by the interpreter of RQD's own environment, which has OpenCue's protocol; nothing else is
imported here. It is told what to do by lines of JSON on standard input, each answered by one line
on standard output, and RQD's reports come as lines there too:

    {"launch": {the fields of a RunFrame}}      {"launched": ""}, or RQD's refusal in words
    {"kill": "id of a frame"}                   {"killed": ""}
                                                {"started": "host of RQD"}
                                                {"completed": "id", "status": 2, "signal": 0}
"""

import json
import sys
import threading
from concurrent import futures

import grpc
from opencue_proto import report_pb2, report_pb2_grpc, rqd_pb2, rqd_pb2_grpc

BOUND_S = 60.0
_printing = threading.Lock()


def say(**facts: object) -> None:
    """One line, whole, whoever else speaks."""
    with _printing:
        print(json.dumps(facts), flush=True)


class Reports(report_pb2_grpc.RqdReportInterfaceServicer):
    """All that an RQD tells a Cuebot. The names are the protocol's."""

    def ReportRqdStartup(self, request, context):
        say(started=request.boot_report.host.name)
        return report_pb2.RqdReportRqdStartupResponse()

    def ReportStatus(self, request, context):
        return report_pb2.RqdReportStatusResponse()

    def ReportRunningFrameCompletion(self, request, context):
        report = request.frame_complete_report
        say(completed=report.frame.frame_id, status=report.exit_status, signal=report.exit_signal)
        return report_pb2.RqdReportRunningFrameCompletionResponse()


def obey(rqd: rqd_pb2_grpc.RqdInterfaceStub, order: dict[str, object]) -> None:
    """Pass an order on to RQD, and say what it answered."""
    (word, about), *_ = order.items()
    done = {"launch": "launched", "kill": "killed"}[word]
    try:
        if word == "launch":
            frame = rqd_pb2.RunFrame(**about)
            rqd.LaunchFrame(rqd_pb2.RqdStaticLaunchFrameRequest(run_frame=frame), timeout=BOUND_S)
        else:
            rqd.KillRunningFrame(
                rqd_pb2.RqdStaticKillRunningFrameRequest(frame_id=about, message="by the test"),
                timeout=BOUND_S,
            )
        say(**{done: ""})
    except grpc.RpcError as error:
        say(**{done: error.details()})


def main() -> None:
    cuebot_port, rqd_port = sys.argv[1:]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    report_pb2_grpc.add_RqdReportInterfaceServicer_to_server(Reports(), server)
    server.add_insecure_port(f"127.0.0.1:{cuebot_port}")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{rqd_port}") as channel:
        rqd = rqd_pb2_grpc.RqdInterfaceStub(channel)
        for line in sys.stdin:  # until whoever started this is gone
            obey(rqd, json.loads(line))
    server.stop(None)


if __name__ == "__main__":
    main()
