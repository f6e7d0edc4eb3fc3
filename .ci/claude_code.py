"""Runs the real Claude Code client through the proxy, with two fake workspaces of which one answers 529 to everything.

The client must print what the healthy workspace said, in a text turn and in a tool turn, and the proxy's numbers must
agree with what the workspaces saw. Whatever is started here is ended here.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

KEY = "client-key-of-the-test"
# Claude Code changes every week; a known one keeps a red run meaningful. CC_VERSION=latest tries the newest.
CLIENT_VERSION = "2.1.330"

CONFIGURATION = """\
server: {{ host: 127.0.0.1, port: 0 }}
auth: {{ api_key: {key} }}
endpoints:
  - {{ name: healthy, api_base: "http://127.0.0.1:{healthy}/serving-endpoints", token: token-healthy }}
  - {{ name: overloaded, api_base: "http://127.0.0.1:{overloaded}/serving-endpoints", token: token-overloaded }}
"""

started = []


def fail(why):
    sys.exit(f"FAIL: {why}")


def start(command, folder, name):
    with open(os.path.join(folder, f"{name}.out"), "wb") as out, open(os.path.join(folder, f"{name}.err"), "wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
    started.append(process)
    return process


def end_all():
    for process in started:
        if process.poll() is None:
            process.terminate()
    for process in started:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(what, process, look):
    """What `look` finds, asked again until it finds something."""
    until = time.monotonic() + 15
    while time.monotonic() < until:
        if (found := look()) is not None:
            return found
        if process.poll() is not None:
            fail(f"{what} ended with {process.returncode}")
        time.sleep(0.02)
    fail(f"{what} did not start within 15 s")


def text_of(folder, name):
    with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
        return file.read()


# Loopback must not go through a proxy of the environment.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url, body=None, headers=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json", **(headers or {})})
    with opener.open(request, timeout=30) as answer:
        return json.loads(answer.read())


def start_workspace(tools, folder, name):
    port_file = os.path.join(folder, f"{name}.port")
    command = [sys.executable, os.path.join(tools, "fake_databricks.py")]
    command += ["--port", "0", "--port-file", port_file, "--token", f"token-{name}", "--name", name]
    process = start(command, folder, name)
    wait_for(name, process, lambda: os.path.exists(port_file) or None)
    return int(text_of(folder, f"{name}.port"))


def start_proxy(binary, folder, ports):
    path = os.path.join(folder, "config.yaml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(CONFIGURATION.format(key=KEY, **ports))
    process = start([binary, "--config", path], folder, "proxy")

    def address():
        found = re.search(r"^claude-lb \S+ listening on (http://127\.0\.0\.1:\d+)$", text_of(folder, "proxy.out"), re.M)
        return found and found[1]

    return process, wait_for("claude-lb", process, address)


def run_client(tools, client, url):
    environment = dict(os.environ, CC_DIR=client)
    environment.setdefault("CC_VERSION", CLIENT_VERSION)
    command = ["bash", os.path.join(tools, "cc_smoke.sh"), url, KEY]
    run = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=900, check=False)
    if run.returncode != 0:
        fail(f"the client's turns ended with {run.returncode}")


def plain_requests(url, count):
    """A few requests without the client, so that both workspaces are asked however it behaves."""
    body = {"model": "claude-sonnet-4-5", "max_tokens": 16, "messages": [{"role": "user", "content": "hi"}]}
    for _ in range(count):
        answer = ask(f"{url}/v1/messages", body, {"x-api-key": KEY})
        if answer.get("content") != [{"type": "text", "text": "CLB-SMOKE-TEXT-OK"}]:
            fail(f"a plain request was answered with {answer}")


def settled_stats(url):
    """/stats once nothing is running, but only for a moment: a place that stays taken is a leak."""
    until = time.monotonic() + 2
    while True:
        stats = ask(f"{url}/stats")
        if all(endpoint["active_requests"] == 0 for endpoint in stats["endpoints"]):
            return stats
        if time.monotonic() > until:
            fail(f"active_requests do not go back to 0: {stats}")
        time.sleep(0.05)


def check_numbers(stats, logs):
    for endpoint in stats["endpoints"]:
        name, requests = endpoint["name"], logs[endpoint["name"]]["requests"]
        seen = [request["status"] for request in requests if "/v1/messages" in request["path"]]
        failures = sum(status != 200 for status in seen)
        print(f"{name}: {endpoint['total_requests']} requests, {endpoint['total_errors']} errors; "
              f"it saw {len(seen)}, of which it refused {failures}")
        if (endpoint["total_requests"], endpoint["total_errors"]) != (len(seen), failures):
            fail(f"{name}: the numbers of /stats and of the workspace differ")
        if endpoint["circuit_open"]:
            fail(f"{name}: its breaker is open, but 529 is not a failure to count")
        if name == "healthy" and (failures or len(seen) < 3):
            fail("the healthy workspace did not serve the client")
        if name == "overloaded" and (not seen or set(seen) != {529}):
            fail("the overloaded workspace was not asked, or answered something else than 529")
        for request in requests:
            headers = {key.lower(): value for key, value in request["headers"]}
            if KEY in str(request["headers"]) or headers.get("authorization") != f"Bearer token-{name}":
                fail(f"{name}: saw the client's key, or not its own token")
    if stats["process"]["panics"]:
        fail(f"{stats['process']['panics']} panics")


def run(arguments, folder):
    ports = {name: start_workspace(arguments.tools, folder, name) for name in ("healthy", "overloaded")}
    ask(f"http://127.0.0.1:{ports['overloaded']}/__force", {"scenario": "error,status=529"})
    proxy, url = start_proxy(arguments.binary, folder, ports)
    plain_requests(url, 4)
    run_client(arguments.tools, arguments.client, url)
    stats = settled_stats(url)
    check_numbers(stats, {name: ask(f"http://127.0.0.1:{port}/__log") for name, port in ports.items()})
    log = text_of(folder, "proxy.err")
    if any(secret in log for secret in (KEY, "token-healthy", "token-overloaded")):
        fail("the log holds a key or a token")
    proxy.send_signal(signal.SIGTERM)
    if (code := proxy.wait(timeout=10)) != 0:
        fail(f"claude-lb ended with {code} after SIGTERM")
    print("PASS the proxy's numbers agree with the workspaces'")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True, type=os.path.abspath)
    parser.add_argument("--tools", required=True, type=os.path.abspath)
    parser.add_argument("--client", required=True, type=os.path.abspath, help="where the client is kept")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    with tempfile.TemporaryDirectory(prefix="claude-lb-ci.") as folder:
        try:
            run(arguments, folder)
        except BaseException:
            if os.path.exists(os.path.join(folder, "proxy.err")):
                print("--- the proxy's log:\n" + text_of(folder, "proxy.err")[-8000:], file=sys.stderr)
            raise
        finally:
            end_all()


main()
