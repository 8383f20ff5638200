-- Who has a mailbox: the holder moves the beat, and whoever sees it stand still for lease_ms may take over.
CREATE TABLE {mailbox} (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    owner BLOB,
    epoch INTEGER NOT NULL DEFAULT 0,
    beat INTEGER NOT NULL DEFAULT 0,
    lease_ms INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO {mailbox} (id, name) VALUES (1, 'outbox:default');

-- What is due and was never refused. AUTOINCREMENT: an id is never used again, since a relay reads with a cursor.
-- Times are microseconds since 1970; headers a JSON array of pairs.
CREATE TABLE {event} (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    mailbox INTEGER NOT NULL REFERENCES {mailbox} (id),
    message_id BLOB NOT NULL CHECK (length(message_id) = 16),
    topic TEXT NOT NULL CHECK (length(topic) BETWEEN 1 AND 200 AND topic NOT GLOB '*[^A-Za-z0-9._-]*'),
    type TEXT NOT NULL CHECK (length(type) BETWEEN 1 AND 255),
    source TEXT,
    key TEXT CHECK (length(key) BETWEEN 1 AND 512),
    content_type TEXT NOT NULL,
    headers TEXT NOT NULL CHECK (substr(headers, 1, 1) = '['),
    time INTEGER CHECK (time BETWEEN -62135596800000000 AND 253402300799999999),
    payload BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    -- Of a dead letter that was redriven.
    errors TEXT
) STRICT;
CREATE INDEX {event_mailbox} ON {event} (mailbox);
INSERT INTO sqlite_sequence (name, seq) VALUES ({'event'}, 0);

-- What was refused, what waits behind it, and the dead letters. The ids are those of the event table.
-- state: 0 head of its key, due at due_at; 1 behind another of its key; 2 head, until its topic is resumed;
--        3 failed; 4 failed, and holding its key
CREATE TABLE {parked} (
    id INTEGER PRIMARY KEY,
    mailbox INTEGER NOT NULL REFERENCES {mailbox} (id),
    message_id BLOB NOT NULL,
    topic TEXT NOT NULL,
    type TEXT NOT NULL,
    source TEXT,
    key TEXT,
    content_type TEXT NOT NULL,
    headers TEXT NOT NULL,
    time INTEGER,
    payload BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    state INTEGER NOT NULL CHECK (state BETWEEN 0 AND 4),
    due_at INTEGER CHECK (due_at BETWEEN 0 AND 253402300799999999),
    errors TEXT NOT NULL,
    finished_at INTEGER
) STRICT;
CREATE INDEX {parked_due} ON {parked} (mailbox, due_at, id) WHERE state = 0;
CREATE INDEX {parked_key} ON {parked} (mailbox, topic, key, id) WHERE state <> 3 AND key IS NOT NULL;
CREATE INDEX {parked_topic} ON {parked} (mailbox, topic, id) WHERE state = 2;
CREATE INDEX {parked_failed} ON {parked} (mailbox, finished_at) WHERE state >= 3;
CREATE INDEX {parked_message} ON {parked} (mailbox, message_id);

-- What is delayed: it enters the event table, under a new id, when its time has come.
CREATE TABLE {scheduled} (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    mailbox INTEGER NOT NULL REFERENCES {mailbox} (id),
    message_id BLOB NOT NULL CHECK (length(message_id) = 16),
    topic TEXT NOT NULL CHECK (length(topic) BETWEEN 1 AND 200 AND topic NOT GLOB '*[^A-Za-z0-9._-]*'),
    type TEXT NOT NULL CHECK (length(type) BETWEEN 1 AND 255),
    source TEXT,
    key TEXT CHECK (length(key) BETWEEN 1 AND 512),
    content_type TEXT NOT NULL,
    headers TEXT NOT NULL CHECK (substr(headers, 1, 1) = '['),
    time INTEGER CHECK (time BETWEEN -62135596800000000 AND 253402300799999999),
    payload BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    due_at INTEGER NOT NULL CHECK (due_at BETWEEN 0 AND 253402300799999999)
) STRICT;
CREATE INDEX {scheduled_due} ON {scheduled} (mailbox, due_at, id);

-- The history of what succeeded.
CREATE TABLE {done} (
    id INTEGER PRIMARY KEY,
    mailbox INTEGER NOT NULL,
    message_id BLOB NOT NULL,
    topic TEXT NOT NULL,
    type TEXT NOT NULL,
    source TEXT,
    key TEXT,
    content_type TEXT NOT NULL,
    headers TEXT NOT NULL,
    time INTEGER,
    payload BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    errors TEXT NOT NULL,
    finished_at INTEGER NOT NULL
) STRICT;
CREATE INDEX {done_finished} ON {done} (mailbox, finished_at);

-- Which messages a group has handled: written with the handler's own effects.
CREATE TABLE {receipt} (
    mailbox INTEGER NOT NULL,
    message_id BLOB NOT NULL,
    seen_at INTEGER NOT NULL,
    PRIMARY KEY (mailbox, message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX {receipt_seen} ON {receipt} (mailbox, seen_at);

-- How far the chain of a message has come, and what has been taken back: small texts, compared and set.
CREATE TABLE {note} (
    mailbox INTEGER NOT NULL,
    message_id BLOB NOT NULL,
    version INTEGER NOT NULL,
    body TEXT NOT NULL,
    written_at INTEGER NOT NULL,
    PRIMARY KEY (mailbox, message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX {note_written} ON {note} (mailbox, written_at);

-- Which members a group has, and what each handles: types and topics are JSON arrays.
CREATE TABLE {member} (
    group_name TEXT NOT NULL,
    owner BLOB NOT NULL CHECK (length(owner) = 16),
    types TEXT NOT NULL,
    topics TEXT NOT NULL,
    registered_at INTEGER NOT NULL,
    seen_at INTEGER NOT NULL,
    PRIMARY KEY (group_name, owner)
) STRICT, WITHOUT ROWID;
