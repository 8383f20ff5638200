"""Writes the golden files of the official Python SDK, and has it read what Postrider writes (the drivers' golden files)."""

import json
import pathlib
import sys
from datetime import datetime, timezone

from cloudevents.core.bindings import amqp, kafka, rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

HERE = pathlib.Path(__file__).parent
ATTRIBUTES = {
    "id": "Ünï-1",
    "source": "/shop/eu",
    "type": "com.example.order.placed",
    "specversion": "1.0",
    "time": datetime(2026, 1, 1, 0, 0, 0, 123000, tzinfo=timezone.utc),
    "datacontenttype": "application/json",
    "subject": "orders/1",
    "partitionkey": "order-1",
    "tenantid": "acme",
    "level": 3,
    "urgent": True,
}


def event():
    return CloudEvent(dict(ATTRIBUTES), {"id": 1, "text": "ü"})


def save(name, headers, body, content_type=None, key=None):
    text = lambda value: value.decode() if isinstance(value, bytes) else value
    golden = {
        "headers": {header: text(value) for header, value in headers.items()},
        "content_type": content_type,
        "key": text(key),
        "body": text(body),
    }
    (HERE / f"python-{name}.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


def write():
    for mode in ("binary", "structured"):
        of_kafka = getattr(kafka, f"to_{mode}")(event(), JSONFormat())
        save(f"kafka-{mode}", of_kafka.headers, of_kafka.value, key=of_kafka.key)
        of_rabbit = getattr(rabbitmq, f"to_{mode}")(event(), JSONFormat())
        save(f"rabbitmq-{mode}", of_rabbit.headers, of_rabbit.body, of_rabbit.content_type)
        of_amqp = getattr(amqp, f"to_{mode}")(event(), JSONFormat())
        content_type = of_amqp.properties.get("content-type")
        save(f"amqp-{mode}", of_amqp.application_properties, of_amqp.application_data, content_type)


def shown(path):
    """A golden file of a driver: the headers, the content type and the body."""
    headers, content_type, body = {}, None, None
    for line in path.read_text().splitlines():
        if line.startswith("header "):
            name, value = line[len("header ") :].split(": ", 1)
            headers.setdefault(name, value)
        elif line.startswith("content type: "):
            content_type = line[len("content type: ") :]
        elif line.startswith("body: "):
            body = line[len("body: ") :].encode()
    return headers, content_type, body


def read():
    drivers = HERE.parent
    for mode in ("binary", "structured"):
        headers, _, body = shown(drivers / f"kafka/tests/kafka/{mode}.golden")
        message = kafka.KafkaMessage({name: value.encode() for name, value in headers.items()}, None, body)
        check(kafka.from_kafka(message, JSONFormat()), f"kafka {mode}")
        headers, content_type, body = shown(drivers / f"rabbitmq/tests/rabbitmq/{mode}.golden")
        headers = {name: int(value[8:-1]) if value.startswith("LongInt(") else value for name, value in headers.items()}
        message = amqp.AMQPMessage({"content-type": content_type}, headers, body)
        check(amqp.from_amqp(message, JSONFormat()), f"amqp {mode}")
        dashed = {name.replace("cloudEvents_", "ce-"): str(value) for name, value in headers.items()}
        message = rabbitmq.RabbitMQMessage(dashed, content_type, body)
        check(rabbitmq.from_rabbitmq(message, JSONFormat()), f"rabbitmq {mode}")


def check(found, what):
    attributes = found.get_attributes()
    expected = {
        "id": "018f4e6a-7c00-7000-8000-000000000001",
        "source": "urn:shop",
        "type": "order.placed.v2",
        "partitionkey": "order-1",
        "sequence": "00000000000000000042",
        "correlationid": "c-1",
    }
    for name, value in expected.items():
        assert attributes.get(name) == value, (what, name, attributes.get(name))
    assert str(attributes.get("level")) == "3", what
    assert attributes["time"] == datetime(2026, 1, 1, 0, 0, 0, 123456, tzinfo=timezone.utc), (what, attributes["time"])
    assert found.get_data() == {"id": 1}, (what, found.get_data())
    print(f"the Python SDK reads {what}", file=sys.stderr)


write()
read()
