"""Runs the real Claude Code client through the proxy.

First with two fake workspaces of which one answers 529 to everything: the client must print what the healthy workspace
said, in a text turn and in a tool turn, and the proxy's numbers must agree with what the workspaces saw. Then with a
workspace that refuses every field that users have reported, for two models: each field must be refused once, and
nothing else may be left out. Whatever is started here is ended here.
"""

import argparse
import collections
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

# The client's own choice, and one that is too old for what it sends then.
STRICT_MODELS = (None, "claude-sonnet-4-5")

CONFIGURATION = """\
server: {{ host: 127.0.0.1, port: 0 }}
auth: {{ api_key: {key} }}
endpoints:
"""
ENDPOINT = """\
  - {{ name: {name}, api_base: "http://127.0.0.1:{port}/serving-endpoints", token: token-{name} }}
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


def start_workspace(tools, folder, name, *options):
    port_file = os.path.join(folder, f"{name}.port")
    command = [sys.executable, os.path.join(tools, "fake_databricks.py")]
    command += ["--port", "0", "--port-file", port_file, "--token", f"token-{name}", "--name", name, *options]
    process = start(command, folder, name)
    wait_for(name, process, lambda: os.path.exists(port_file) or None)
    return int(text_of(folder, f"{name}.port"))


def start_proxy(binary, folder, ports):
    path = os.path.join(folder, "config.yaml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(CONFIGURATION.format(key=KEY))
        file.writelines(ENDPOINT.format(name=name, port=port) for name, port in ports.items())
    process = start([binary, "--config", path], folder, "proxy")

    def address():
        found = re.search(r"^claude-lb \S+ listening on (http://127\.0\.0\.1:\d+)$", text_of(folder, "proxy.out"), re.M)
        return found and found[1]

    return process, wait_for("claude-lb", process, address)


def run_client(tools, client, url, model=None):
    environment = dict(os.environ, CC_DIR=client)
    environment.setdefault("CC_VERSION", CLIENT_VERSION)
    if model:
        environment["CC_MODEL"] = model
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


def place(refusal):
    """The field of a refusal, without the index that it has in one request."""
    return re.sub(r"\.\d+\.", ".*.", refusal.split(": Extra inputs")[0])


def check_learning(stats, requests):
    requests = [request for request in requests if "/v1/messages" in request["path"]]
    refused = [request for request in requests if "Extra inputs" in request.get("strict", "")]
    counts = collections.Counter(place(request["strict"]) for request in refused)
    changes = stats["compat"]["changes"]
    learned = {change["path"] for change in changes if change["reason"] == "learned"}
    print(f"refused: {dict(counts)}; left out: {[(change['path'], change['reason']) for change in changes]}")
    if not counts or set(counts.values()) != {1}:
        fail("each field must be refused, and once only")
    if len(learned) != len(counts) or stats["compat"]["extra_attempts"] != len(counts):
        fail("another number of fields was learned, or of attempts made, than was refused")
    if any(change["reason"] not in ("learned", "model") for change in changes):
        fail("something else was left out")
    # The first refused request is what the client sent.
    sent = refused[0]["body"]
    answered = next((one["body"] for one in requests if one["status"] == 200 and one["body"].get("tools")), None)
    if answered is None:
        fail("no request with tools was answered")
    if set(sent) - learned != set(answered):
        fail(f"the client sent {sorted(sent)}, and the workspace got {sorted(answered)}")
    kept = [{key for tool in body["tools"] for key in tool} for body in (sent, answered)]
    if {f"tools.*.{key}" for key in kept[0] - kept[1]} - learned:
        fail(f"tools lost more than was refused: {kept}")
    if "cache_control" not in json.dumps(answered["system"]):
        fail("the prompt cache was left out")


def run_strict(arguments, folder, model):
    port = start_workspace(arguments.tools, folder, "strict", "--strict")
    proxy, url = start_proxy(arguments.binary, folder, {"strict": port})
    run_client(arguments.tools, arguments.client, url, model)
    check_learning(settled_stats(url), ask(f"http://127.0.0.1:{port}/__log")["requests"])
    proxy.send_signal(signal.SIGTERM)
    if (code := proxy.wait(timeout=10)) != 0:
        fail(f"claude-lb ended with {code} after SIGTERM")
    print(f"PASS what a strict workspace refuses is left out, and nothing else ({model or 'default model'})")


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
    in_folder(lambda folder: run(arguments, folder))
    for model in STRICT_MODELS:
        in_folder(lambda folder, model=model: run_strict(arguments, folder, model))


def in_folder(work):
    with tempfile.TemporaryDirectory(prefix="claude-lb-ci.") as folder:
        try:
            work(folder)
        except BaseException:
            if os.path.exists(os.path.join(folder, "proxy.err")):
                print("--- the proxy's log:\n" + text_of(folder, "proxy.err")[-8000:], file=sys.stderr)
            raise
        finally:
            end_all()


main()
