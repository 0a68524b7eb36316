"""HTTP/1.1 clients that offer to go on in another protocol; a server may ignore that."""

import http.client
import json
import socket
import subprocess

from tests.support import programs
from tests.support.commands import HANG_S

JDK_HEAD = """POST {path} HTTP/1.1\r
Connection: Upgrade, HTTP2-Settings\r
Content-Length: {length}\r
Host: 127.0.0.1:{port}\r
HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r
Upgrade: h2c\r
User-Agent: Java-http-client/17.0.15\r
Content-Type: application/json\r
\r
"""
"""What the JDK's HttpClient sends before the body, byte by byte."""

JAVA = """
import java.net.URI;
import java.net.http.*;

class Ask {
  public static void main(String[] args) throws Exception {
    var body = HttpRequest.BodyPublishers.ofString(args[1]);
    var uri = URI.create(args[0]);
    var request = HttpRequest.newBuilder(uri).header("Content-Type", "application/json").POST(body);
    var client = HttpClient.newHttpClient();
    for (int i = 0; i < 2; i++)  // the second through the same connection
      System.out.println(
          client.send(request.build(), HttpResponse.BodyHandlers.ofString()).body());
  }
}
"""


def ask_as_jdk(port, ask, path="/rerank", split=True):
    """Send two requests through one connection, header and body apart or at once."""
    body = json.dumps(ask).encode()
    head = JDK_HEAD.format(path=path, port=port, length=len(body)).encode()
    answers = []
    with socket.create_connection(("127.0.0.1", port), HANG_S) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for part in (head, body) if split else (head + body,):
                opened.sendall(part)
            reply = http.client.HTTPResponse(opened)
            reply.begin()
            answers.append((reply.status, json.loads(reply.read())))
    return answers


def ask_with_java(port, ask, folder):
    programs.require("java")
    (folder / "Ask.java").write_text(JAVA)
    command = ["java", str(folder / "Ask.java"), f"http://127.0.0.1:{port}/rerank", json.dumps(ask)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def ask_with_curl(port, ask):
    programs.require("curl")
    headers = ["-H", "Content-Type: application/json"]
    url = f"http://127.0.0.1:{port}/rerank"
    command = ["curl", "-sS", "--http2", url, *headers, "-d", json.dumps(ask)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=True)
    return json.loads(done.stdout)
