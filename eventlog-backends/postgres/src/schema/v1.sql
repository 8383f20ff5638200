-- Names in braces get their schema and prefix; a name with a ! only its prefix, as CREATE INDEX wants it.

-- What the log knows of itself: schema_version, oldest_reader (the oldest program that may use this schema),
-- history_slot_seconds (how long one slot of the history is written), max_message_bytes (for append()).
CREATE TABLE {settings} (name text PRIMARY KEY, value bigint NOT NULL);
INSERT INTO {settings} VALUES ('history_slot_seconds', 6172), ('max_message_bytes', 921600);

-- The clock that leases and due times are counted by. A function, so that a test can move it; it is inlined.
CREATE FUNCTION {clock}() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE AS 'SELECT pg_catalog.clock_timestamp()';

CREATE TABLE {mailbox} (
    id smallint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE
);
INSERT INTO {mailbox} (name) VALUES ('outbox:default');

-- Who is alive: one row for each session, renewed by it. A row that has expired is deleted by whoever takes its lanes,
-- so that a lease which is over stays over, wherever the clock goes.
CREATE TABLE {relay} (
    mailbox smallint NOT NULL,
    owner uuid NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (mailbox, owner)
) WITH (fillfactor = 50);

-- Who owns which part of a mailbox. Written only when a lane changes hands, so that the fence is cheap to check.
CREATE TABLE {lane} (
    mailbox smallint NOT NULL,
    lane smallint NOT NULL,
    owner uuid,
    epoch bigint NOT NULL DEFAULT 0,
    freed_at timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (mailbox, lane)
) WITH (fillfactor = 50);
INSERT INTO {lane} (mailbox, lane) SELECT 1, generate_series(0, 63);

-- The lane of a key: part of the format. The first byte of the MD5 of the key in UTF-8, or of the 16 bytes of the
-- message id where there is no key, modulo 64.
CREATE FUNCTION {lane_of}(key text, message_id uuid) RETURNS smallint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $postrider$ SELECT (get_byte(decode(md5(CASE WHEN $1 IS NULL THEN uuid_send($2) ELSE convert_to($1, 'UTF8') END), 'hex'), 0) & 63)::smallint $postrider$;

-- What is due and was never refused. Ids are taken by the INSERT itself, behind its lock on the table: the settled
-- floor rests on that. Statistics of an emptied queue mislead, so there are none.
CREATE TABLE {event} (
    mailbox smallint NOT NULL,
    lane smallint NOT NULL,
    id bigint NOT NULL GENERATED ALWAYS AS IDENTITY (SEQUENCE NAME {position}),
    message_id uuid NOT NULL,
    topic text NOT NULL,
    type text NOT NULL,
    source text,
    key text,
    content_type text NOT NULL,
    headers text NOT NULL,
    time timestamptz,
    payload bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Of a dead letter that was redriven.
    errors jsonb,
    PRIMARY KEY (mailbox, lane, id),
    CONSTRAINT {event_valid!} CHECK (lane BETWEEN 0 AND 63 AND octet_length(key) BETWEEN 1 AND 512 AND octet_length(type) BETWEEN 1 AND 255
        AND octet_length(topic) BETWEEN 1 AND 200 AND topic ~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$' AND left(headers, 1) = '[' AND isfinite(created_at)
        AND time BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00')
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0,
    autovacuum_vacuum_insert_threshold = -1, vacuum_truncate = off,
    autovacuum_analyze_threshold = 2147483647, autovacuum_analyze_scale_factor = 100
);

-- For looking up a key; two that collide are told apart by their texts.
CREATE FUNCTION {key_hash}(mailbox smallint, topic text, key text) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    'SELECT hashtextextended($2 || ''/'' || $3, $1)';

-- What was refused, what waits behind it, and the dead letters. The ids are those of the event table.
-- state: 0 head of its key, due at next_at; 1 behind another of its key; 2 head, until its topic is resumed;
--        3 failed; 4 failed, and holding its key
CREATE TABLE {parked} (
    mailbox smallint NOT NULL,
    lane smallint NOT NULL,
    id bigint PRIMARY KEY,
    message_id uuid NOT NULL,
    topic text NOT NULL,
    type text NOT NULL,
    source text,
    key text CHECK (octet_length(key) <= 512),
    content_type text NOT NULL,
    headers text NOT NULL,
    time timestamptz,
    payload bytea NOT NULL,
    created_at timestamptz NOT NULL,
    attempts integer NOT NULL,
    state smallint NOT NULL,
    next_at timestamptz,
    errors jsonb NOT NULL,
    finished_at timestamptz,
    key_hash bigint GENERATED ALWAYS AS ({key_hash}(mailbox, topic, key)) STORED,
    -- Less than of an event: what cannot be read becomes a dead letter here.
    CONSTRAINT {parked_valid!} CHECK (lane BETWEEN 0 AND 63 AND state BETWEEN 0 AND 4 AND attempts >= 0 AND isfinite(created_at)
        AND next_at BETWEEN '1970-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00')
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0,
    vacuum_truncate = off, autovacuum_analyze_threshold = 2147483647, autovacuum_analyze_scale_factor = 100
);
-- Each question has one index that can answer it, so that it does not matter what the planner believes of a table that
-- was empty when it was last looked at.
CREATE INDEX {parked_lane!} ON {parked} (mailbox, lane, id);
CREATE INDEX {parked_due!} ON {parked} (mailbox, lane, next_at) WHERE state = 0;
CREATE INDEX {parked_key!} ON {parked} (key_hash, id) WHERE state <> 3 AND key_hash IS NOT NULL;
CREATE INDEX {parked_head!} ON {parked} (key_hash, id) WHERE state IN (0, 2) AND key_hash IS NOT NULL;
CREATE INDEX {parked_topic!} ON {parked} (mailbox, topic, id) WHERE state = 2;
CREATE INDEX {parked_failed!} ON {parked} (mailbox, finished_at) WHERE state >= 3;
CREATE INDEX {parked_message!} ON {parked} (message_id);

-- What is delayed: it enters the event table, under a new id, when its time has come. Its own ids only break ties.
CREATE TABLE {scheduled} (
    mailbox smallint NOT NULL,
    lane smallint NOT NULL,
    id bigint NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id uuid NOT NULL,
    topic text NOT NULL,
    type text NOT NULL,
    source text,
    key text,
    content_type text NOT NULL,
    headers text NOT NULL,
    time timestamptz,
    payload bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    due_at timestamptz NOT NULL,
    CONSTRAINT {scheduled_valid!} CHECK (lane BETWEEN 0 AND 63 AND octet_length(key) BETWEEN 1 AND 512 AND octet_length(type) BETWEEN 1 AND 255
        AND octet_length(topic) BETWEEN 1 AND 200 AND topic ~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$' AND left(headers, 1) = '[' AND isfinite(created_at)
        AND time BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00' AND due_at BETWEEN '1970-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00')
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0,
    vacuum_truncate = off, autovacuum_analyze_threshold = 2147483647, autovacuum_analyze_scale_factor = 100
);
CREATE INDEX {scheduled_due!} ON {scheduled} (mailbox, lane, due_at);

-- The history of what succeeded: a ring of slots, each written for history_slot_seconds and emptied as a whole, so that
-- nothing needs the right to create or drop at run time.
CREATE TABLE {done} (
    mailbox smallint NOT NULL,
    lane smallint NOT NULL,
    id bigint NOT NULL,
    message_id uuid NOT NULL,
    topic text NOT NULL,
    type text NOT NULL,
    source text,
    key text,
    content_type text NOT NULL,
    headers text NOT NULL,
    time timestamptz,
    payload bytea NOT NULL,
    created_at timestamptz NOT NULL,
    attempts integer NOT NULL,
    errors jsonb NOT NULL,
    finished_at timestamptz NOT NULL,
    slot smallint NOT NULL
) PARTITION BY LIST (slot);
CREATE TABLE {done_0} PARTITION OF {done} FOR VALUES IN (0);
CREATE TABLE {done_1} PARTITION OF {done} FOR VALUES IN (1);
CREATE TABLE {done_2} PARTITION OF {done} FOR VALUES IN (2);
CREATE TABLE {done_3} PARTITION OF {done} FOR VALUES IN (3);
CREATE TABLE {done_4} PARTITION OF {done} FOR VALUES IN (4);
CREATE TABLE {done_5} PARTITION OF {done} FOR VALUES IN (5);
CREATE TABLE {done_6} PARTITION OF {done} FOR VALUES IN (6);
CREATE TABLE {done_7} PARTITION OF {done} FOR VALUES IN (7);
CREATE TABLE {done_8} PARTITION OF {done} FOR VALUES IN (8);
CREATE TABLE {done_9} PARTITION OF {done} FOR VALUES IN (9);
CREATE TABLE {done_10} PARTITION OF {done} FOR VALUES IN (10);
CREATE TABLE {done_11} PARTITION OF {done} FOR VALUES IN (11);
CREATE TABLE {done_12} PARTITION OF {done} FOR VALUES IN (12);
CREATE TABLE {done_13} PARTITION OF {done} FOR VALUES IN (13);
CREATE TABLE {done_14} PARTITION OF {done} FOR VALUES IN (14);
CREATE TABLE {done_15} PARTITION OF {done} FOR VALUES IN (15);

CREATE FUNCTION {slot}() RETURNS smallint LANGUAGE sql STABLE AS
    $postrider$ SELECT (extract(epoch FROM {clock}())::bigint / (SELECT value FROM {settings} WHERE name = 'history_slot_seconds') % 16)::smallint $postrider$;

-- Which messages a group has handled: written with the handler's own effects.
CREATE TABLE {receipt} (
    mailbox smallint NOT NULL,
    message_id uuid NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (mailbox, message_id)
);
CREATE INDEX {receipt_seen!} ON {receipt} (mailbox, seen_at);

-- What is to be done with messages that have arrived, and the receipts of the new ones: for each, in order, 0 new, 1 handled
-- before, 2 waiting or dead itself, 3 held back by another of its key. A function, so that it is planned once a connection, and
-- not by the statistics or the settings of whoever calls: what it asks for is found by indexes.
CREATE FUNCTION {admit}(box smallint, ids uuid[], topics text[], keys text[], own boolean[])
RETURNS SETOF integer LANGUAGE plpgsql SET plan_cache_mode = 'force_generic_plan' SET enable_seqscan = 'off' SET enable_bitmapscan = 'off'
SET enable_hashjoin = 'off' SET enable_mergejoin = 'off' SET jit = 'off' AS $postrider$
#variable_conflict use_column
BEGIN
    RETURN QUERY WITH asked AS MATERIALIZED (SELECT u.id, u.n, s.yes IS NOT NULL AS seen, NOT u.own AND p.yes IS NOT NULL AS waits, NOT u.own AND h.yes IS NOT NULL AS held
            FROM unnest(ids, topics, keys, own) WITH ORDINALITY u (id, topic, key, own, n)
            LEFT JOIN LATERAL (SELECT true AS yes FROM {receipt} r WHERE r.mailbox = box AND r.message_id = u.id LIMIT 1) s ON true
            LEFT JOIN LATERAL (SELECT true AS yes FROM {parked} p WHERE p.message_id = u.id AND p.mailbox + 0 = box LIMIT 1) p ON true
            LEFT JOIN LATERAL (SELECT true AS yes FROM {parked} h WHERE h.key_hash = {key_hash}(box, u.topic, u.key) AND h.key_hash IS NOT NULL
                AND h.topic = u.topic AND h.key = u.key AND h.state <> 3 LIMIT 1) h ON true),
        fresh AS (INSERT INTO {receipt} (mailbox, message_id, seen_at) SELECT box, a.id, {clock}() FROM (SELECT DISTINCT id FROM asked WHERE NOT seen AND NOT waits AND NOT held) a
            ORDER BY a.id ON CONFLICT DO NOTHING RETURNING message_id)
        SELECT CASE WHEN a.seen THEN 1 WHEN a.waits THEN 2 WHEN a.held THEN 3 WHEN f.message_id IS NULL THEN 1
            WHEN a.n > min(a.n) OVER (PARTITION BY a.id) THEN 1 ELSE 0 END
        FROM asked a LEFT JOIN fresh f ON f.message_id = a.id ORDER BY a.n;
END $postrider$;

-- The same without writing, and only what is known of them: 1 and 2 with the message, 3 with topic and key.
CREATE FUNCTION {look}(box smallint, ids uuid[], topics text[], keys text[])
RETURNS TABLE (what integer, id uuid, topic text, key text) LANGUAGE plpgsql SET plan_cache_mode = 'force_generic_plan' SET enable_seqscan = 'off'
SET enable_bitmapscan = 'off' SET enable_mergejoin = 'off' SET jit = 'off' AS $postrider$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT 1, r.message_id, NULL::text, NULL::text FROM {receipt} r WHERE r.mailbox = box AND r.message_id = ANY (ids)
        UNION ALL SELECT 2, p.message_id, NULL, NULL FROM {parked} p WHERE p.message_id = ANY (ids) AND p.mailbox + 0 = box
        UNION ALL SELECT 3, NULL, u.topic, u.key FROM (SELECT DISTINCT u.topic, u.key FROM unnest(topics, keys) u (topic, key) WHERE u.key IS NOT NULL) u
            CROSS JOIN LATERAL (SELECT FROM {parked} h WHERE h.key_hash = {key_hash}(box, u.topic, u.key) AND h.key_hash IS NOT NULL
                AND h.topic = u.topic AND h.key = u.key AND h.state <> 3 LIMIT 1) h;
END $postrider$;

-- How far the chain of a message has come, and what has been taken back: small texts, compared and set.
CREATE TABLE {note} (
    mailbox smallint NOT NULL,
    message_id uuid NOT NULL,
    version bigint NOT NULL,
    body text NOT NULL,
    written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (mailbox, message_id)
);
CREATE INDEX {note_written!} ON {note} (mailbox, written_at);

-- Which members a group has, and what each handles.
CREATE TABLE {member} (
    group_name text NOT NULL,
    owner uuid NOT NULL,
    types text[] NOT NULL,
    topics text[] NOT NULL,
    registered_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (group_name, owner)
) WITH (fillfactor = 50);

-- An event from any language: SELECT append('orders', 'order.placed.v1', '{"n": 1}', key => 'o-1'), in your transaction.
CREATE FUNCTION {append}(
    topic text, type text, payload bytea, key text DEFAULT NULL, headers jsonb DEFAULT '[]', not_before timestamptz DEFAULT NULL,
    content_type text DEFAULT 'application/octet-stream', source text DEFAULT NULL, id uuid DEFAULT NULL,
    occurred_at timestamptz DEFAULT clock_timestamp(), route text DEFAULT 'default', attributes jsonb DEFAULT '{}'
) RETURNS uuid LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $postrider$
#variable_conflict use_variable
DECLARE
    box smallint;
    pairs jsonb := coalesce(headers, '[]');
    size bigint;
    most bigint;
    wrong text;
BEGIN
    -- One of Postrider's own, which nobody else has.
    id := coalesce(id, overlay(overlay(gen_random_uuid()::text PLACING '8' FROM 15) PLACING '5052' FROM 33)::uuid);
    wrong := CASE
        WHEN topic IS NULL OR octet_length(topic) NOT BETWEEN 1 AND 200 OR topic !~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$'
            THEN 'the topic has to be 1 to 200 bytes of A-Z a-z 0-9 . _ - without an empty segment'
        WHEN type IS NULL OR octet_length(type) NOT BETWEEN 1 AND 255 THEN 'the type has to have 1 to 255 bytes'
        WHEN octet_length(source) NOT BETWEEN 1 AND 255 THEN 'the source has to have 1 to 255 bytes'
        WHEN content_type IS NULL OR octet_length(content_type) NOT BETWEEN 1 AND 255 THEN 'the content type has to have 1 to 255 bytes'
        WHEN octet_length(key) NOT BETWEEN 1 AND 512 THEN 'the key has to have 1 to 512 bytes: leave it out for an unordered event'
        WHEN payload IS NULL THEN 'the payload is null: an empty one is fine'
        WHEN occurred_at NOT BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00'
            THEN 'occurred_at has to be between the years 1 and 9999: leave it out, or give null, if there is none'
        WHEN not_before > '9999-12-31 23:59:59.999999+00' THEN 'not_before has to be before the year 10000: `infinity` is never'
        WHEN jsonb_typeof(pairs) NOT IN ('array', 'object') THEN 'the headers have to be an object, or an array of pairs'
        WHEN jsonb_typeof(attributes) <> 'object' THEN 'the attributes have to be an object'
    END;
    IF wrong IS NULL AND jsonb_typeof(pairs) = 'object' THEN
        SELECT coalesce(jsonb_agg(jsonb_build_array(h.key, h.value)), '[]') INTO pairs FROM jsonb_each(pairs) h;
    END IF;
    IF wrong IS NULL AND EXISTS (
        SELECT 1 FROM jsonb_array_elements(pairs) p WHERE CASE
            WHEN jsonb_typeof(p) <> 'array' THEN true
            ELSE jsonb_array_length(p) <> 2 OR jsonb_typeof(p->0) <> 'string' OR jsonb_typeof(p->1) <> 'string'
                OR octet_length(p->>0) NOT BETWEEN 1 AND 255 END
    ) THEN
        wrong := 'a header has to be a name of 1 to 255 bytes and a value, both strings';
    END IF;
    IF wrong IS NULL AND EXISTS (
        SELECT 1 FROM jsonb_array_elements(pairs) p WHERE p->>0 ~* '^(ce_|ce-|cloudevents|postrider-|content-type$)'
    ) THEN
        wrong := 'the name of a header is one that CloudEvents or Postrider use on the wire: choose another';
    END IF;
    IF wrong IS NULL AND attributes <> '{}' THEN
        SELECT min(CASE
            WHEN a.key !~ '^[a-z0-9]{1,255}$' THEN 'the name of an attribute has to be letters a to z and digits'
            WHEN a.key = ANY ('{specversion,id,type,source,time,datacontenttype,data,partitionkey,sequence,sequencetype}')
                THEN 'an attribute is one that CloudEvents has a meaning for: it has a parameter of its own'
            WHEN jsonb_typeof(a.value) NOT IN ('string', 'boolean', 'number')
                THEN 'the value of an attribute has to be a string, an integer of 32 bits, or a boolean'
            WHEN jsonb_typeof(a.value) = 'number' AND ((a.value #>> '{}')::numeric % 1 <> 0 OR (a.value #>> '{}')::numeric NOT BETWEEN -2147483648 AND 2147483647)
                THEN 'the value of an attribute has to be a string, an integer of 32 bits, or a boolean' END)
            INTO wrong FROM jsonb_each(attributes) a;
        IF wrong IS NULL THEN
            SELECT jsonb_agg(jsonb_build_array('ce-' || a.key, a.value) ORDER BY a.key COLLATE "C") || pairs INTO pairs FROM jsonb_each(attributes) a;
        END IF;
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION '%', wrong USING ERRCODE = 'invalid_parameter_value';
    END IF;
    size := octet_length(payload) + octet_length(type) + octet_length(content_type) + coalesce(octet_length(key), 0) + coalesce(octet_length(source), 0)
        + coalesce((SELECT sum(octet_length(p->>0) + octet_length(p->>1)) FROM jsonb_array_elements(pairs) p), 0);
    IF (SELECT sum(octet_length(p->>0) + octet_length(p->>1) + 20) FROM jsonb_array_elements(pairs) p) > 122880 THEN
        RAISE EXCEPTION 'the headers of the message have more than 122880 bytes: put what they say into the payload'
            USING ERRCODE = 'program_limit_exceeded';
    END IF;
    SELECT value INTO most FROM {settings} WHERE name = 'max_message_bytes';
    IF size > most THEN
        RAISE EXCEPTION 'the message has % bytes, the most is %: keep the bulk elsewhere and send a reference', size, most
            USING ERRCODE = 'program_limit_exceeded';
    END IF;
    SELECT m.id INTO box FROM {mailbox} m WHERE m.name = 'outbox:' || route;
    IF box IS NULL THEN
        RAISE EXCEPTION 'there is no route %', quote_nullable(route) USING ERRCODE = 'invalid_parameter_value',
            HINT = 'A route comes into being when a relay of it has been started once.';
    END IF;
    IF not_before > {clock}() THEN
        INSERT INTO {scheduled} (mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload, created_at, due_at)
            SELECT box, {lane_of}(key, id), id, topic, type, source, key, content_type, pairs::text, occurred_at, payload, {clock}(), greatest(not_before, {clock}());
    ELSE
        INSERT INTO {event} (mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload, created_at)
            SELECT box, {lane_of}(key, id), id, topic, type, source, key, content_type, pairs::text, occurred_at, payload, {clock}();
    END IF;
    RETURN id;
END $postrider$;

-- The same for JSON, as text or as a value.
CREATE FUNCTION {append}(
    topic text, type text, payload text, key text DEFAULT NULL, headers jsonb DEFAULT '[]', not_before timestamptz DEFAULT NULL,
    content_type text DEFAULT 'application/json', source text DEFAULT NULL, id uuid DEFAULT NULL,
    occurred_at timestamptz DEFAULT clock_timestamp(), route text DEFAULT 'default', attributes jsonb DEFAULT '{}'
) RETURNS uuid LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
    -- What is said to be JSON has to be: the cast says where it is not.
    $postrider$ SELECT {append}($1, $2, convert_to(CASE WHEN $7 ~* '^(application/json|text/json|[^;]*\+json) *(;|$)' THEN ($3::json)::text ELSE $3 END, 'UTF8'),
        $4, $5, $6, $7, $8, $9, $10, $11, $12) $postrider$;
CREATE FUNCTION {append}(
    topic text, type text, payload json, key text DEFAULT NULL, headers jsonb DEFAULT '[]', not_before timestamptz DEFAULT NULL,
    content_type text DEFAULT 'application/json', source text DEFAULT NULL, id uuid DEFAULT NULL,
    occurred_at timestamptz DEFAULT clock_timestamp(), route text DEFAULT 'default', attributes jsonb DEFAULT '{}'
) RETURNS uuid LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
    $postrider$ SELECT {append}($1, $2, convert_to($3::text, 'UTF8'), $4, $5, $6, $7, $8, $9, $10, $11, $12) $postrider$;
CREATE FUNCTION {append}(
    topic text, type text, payload jsonb, key text DEFAULT NULL, headers jsonb DEFAULT '[]', not_before timestamptz DEFAULT NULL,
    content_type text DEFAULT 'application/json', source text DEFAULT NULL, id uuid DEFAULT NULL,
    occurred_at timestamptz DEFAULT clock_timestamp(), route text DEFAULT 'default', attributes jsonb DEFAULT '{}'
) RETURNS uuid LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
    $postrider$ SELECT {append}($1, $2, convert_to($3::text, 'UTF8'), $4, $5, $6, $7, $8, $9, $10, $11, $12) $postrider$;
REVOKE ALL ON FUNCTION {append}(text, text, bytea, text, jsonb, timestamptz, text, text, uuid, timestamptz, text, jsonb) FROM PUBLIC;
REVOKE ALL ON FUNCTION {append}(text, text, text, text, jsonb, timestamptz, text, text, uuid, timestamptz, text, jsonb) FROM PUBLIC;
REVOKE ALL ON FUNCTION {append}(text, text, json, text, jsonb, timestamptz, text, text, uuid, timestamptz, text, jsonb) FROM PUBLIC;
REVOKE ALL ON FUNCTION {append}(text, text, jsonb, text, jsonb, timestamptz, text, text, uuid, timestamptz, text, jsonb) FROM PUBLIC;
