// Writes the golden files of the official JavaScript SDK, and has it read what Postrider writes to Kafka.

import { createRequire } from "node:module";
import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { dirname, join } from "node:path";
import assert from "node:assert";

const require = createRequire(process.env.NODE_PATH + "/");
const { CloudEvent, Kafka } = require("cloudevents");
const here = dirname(fileURLToPath(import.meta.url));

const event = new CloudEvent({
  id: "Ünï-1",
  source: "/shop/eu",
  type: "com.example.order.placed",
  time: "2026-01-01T00:00:00.123Z",
  datacontenttype: "application/json",
  subject: "orders/1",
  partitionkey: "order-1",
  tenantid: "acme",
  level: 3,
  urgent: true,
  data: { id: 1, text: "ü" },
});
for (const mode of ["binary", "structured"]) {
  const { headers, key, value } = Kafka[mode](event);
  const body = typeof value === "string" ? value : JSON.stringify(value);
  const golden = { headers, content_type: null, key, body };
  writeFileSync(join(here, `javascript-kafka-${mode}.json`), JSON.stringify(golden, null, 1) + "\n");
}

for (const mode of ["binary", "structured"]) {
  const headers = {};
  let body;
  for (const line of readFileSync(join(here, `../kafka/tests/kafka/${mode}.golden`), "utf8").split("\n")) {
    const header = /^header ([^:]+): (.*)$/.exec(line);
    if (header) headers[header[1]] ??= header[2];
    if (line.startsWith("body: ")) body = line.slice(6);
  }
  const found = Kafka.toEvent({ headers, key: "order-1", value: body, body, timestamp: "0" });
  assert.equal(found.id, "018f4e6a-7c00-7000-8000-000000000001", mode);
  assert.equal(found.source, "urn:shop", mode);
  assert.equal(found.type, "order.placed.v2", mode);
  assert.equal(found.correlationid, "c-1", mode);
  assert.equal(String(found.level), "3", mode);
  assert.equal(new Date(found.time).toISOString(), "2026-01-01T00:00:00.123Z", mode);
  assert.deepEqual(typeof found.data === "string" ? JSON.parse(found.data) : found.data, { id: 1 }, mode);
  console.error(`the JavaScript SDK reads kafka ${mode}`);
}
