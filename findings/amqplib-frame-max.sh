#!/usr/bin/env bash
# node's amqplib before 0.10.6 asks for the smallest frames, whatever the server offers.
#
# In the handshake the server offers a largest size of frames, and the client answers with the size
# that both will use. RabbitMQ offers 131072 bytes. Since 4.1 it refuses less than 8192.
#
# Expected: the client takes what it is offered, as pika does.
# Seen with amqplib 0.10.5 and Node.js 20: it answers 4096, the least that AMQP 0-9-1 allows. So a
# program that worked for years cannot connect after an upgrade of the broker. What it is told is
# only that the connection was closed; the reason stands in the broker's log.
# amqplib 0.10.6 answers 131072. "?frameMax=0" in the URL helps the older ones.
#
# Output seen:
#     amqplib 0.10.5: 4096
#     amqplib 0.10.5 with frameMax=0: 131072
#     amqplib 0.10.6: 131072
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund old@npm:amqplib@0.10.5 new@npm:amqplib@0.10.6
cat >frame-max.js <<'JS'
const assert = require('assert');
const net = require('net');

// The payload of a method frame on channel 0, with its head and its end.
function method(payload) {
  const head = Buffer.alloc(7);
  head.writeUInt8(1, 0);
  head.writeUInt32BE(payload.length, 3);
  return Buffer.concat([head, payload, Buffer.from([0xce])]);
}

const text = words => Buffer.concat([Buffer.from([0, 0, 0, words.length]), Buffer.from(words)]);
// Connection.Start of AMQP 0-9, without properties; and Connection.Tune: 2047 channels, 128 KiB.
const start = method(Buffer.concat([
  Buffer.from([0, 10, 0, 10, 0, 9, 0, 0, 0, 0]), text('PLAIN AMQPLAIN'), text('en_US')]));
const tune = method(Buffer.from([0, 10, 0, 30, 0x07, 0xff, 0, 2, 0, 0, 0, 0]));

// Return the size of frames with which a client answers.
function frameMax(amqplib, query) {
  return new Promise(resolve => {
    const server = net.createServer(socket => {
      let seen = Buffer.alloc(0);
      let answers = 0;
      socket.on('error', () => {});
      socket.on('data', data => {
        seen = Buffer.concat([seen, data]);
        if (answers === 0 && seen.length >= 8) {
          seen = seen.subarray(8); // the header
          socket.write(start);
          answers = 1;
        }
        while (answers > 0 && seen.length >= 8 && seen.length >= seen.readUInt32BE(3) + 8) {
          const [kind, payload] = [seen.readUInt16BE(9), seen.subarray(7)];
          if (kind === 11) socket.write(tune); // StartOk
          if (kind === 31) { // TuneOk: channels, size of frames
            resolve(payload.readUInt32BE(6));
            socket.destroy();
            server.close();
            return;
          }
          seen = seen.subarray(seen.readUInt32BE(3) + 8);
        }
      });
    });
    server.listen(0, '127.0.0.1', () => {
      const url = `amqp://guest:guest@127.0.0.1:${server.address().port}/${query}`;
      amqplib.connect(url).catch(() => {}); // the server ends the connection
    });
  });
}

(async () => {
  const seen = [
    ['amqplib 0.10.5', await frameMax(require('old'), ''), 4096],
    ['amqplib 0.10.5 with frameMax=0', await frameMax(require('old'), '?frameMax=0'), 131072],
    ['amqplib 0.10.6', await frameMax(require('new'), ''), 131072],
  ];
  for (const [client, size, expected] of seen) {
    console.log(`${client}: ${size}`);
    assert.strictEqual(size, expected);
  }
})();
JS
timeout 60 node frame-max.js
