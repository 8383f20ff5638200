//! Every statement, with the names filled in: the one place where identifiers become SQL.

use sqlx::{AssertSqlSafe, SqlSafeStr as _, SqlStr};
use std::sync::Arc;

/// The columns that make a message, in the order [`row::Reader`](crate::row::Reader) reads them.
macro_rules! message_columns {
    ($table:literal) => {
        concat!(
            $table,
            "lane, ",
            $table,
            "id, ",
            $table,
            "message_id, ",
            $table,
            "topic, ",
            $table,
            "type, ",
            $table,
            "source, ",
            $table,
            "key, ",
            $table,
            "content_type, ",
            $table,
            "headers, ",
            $table,
            "time, ",
            $table,
            "payload"
        )
    };
}

/// What an event is entered with: its id is given by the table.
macro_rules! event_columns {
    () => {
        "mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload, created_at"
    };
}

/// What a row keeps as it moves from table to table.
macro_rules! moved_columns {
    ($table:literal) => {
        concat!(
            $table,
            "mailbox, ",
            $table,
            "lane, ",
            $table,
            "id, ",
            $table,
            "message_id, ",
            $table,
            "topic, ",
            $table,
            "type, ",
            $table,
            "source, ",
            $table,
            "key, ",
            $table,
            "content_type, ",
            $table,
            "headers, ",
            $table,
            "time, ",
            $table,
            "payload, ",
            $table,
            "created_at"
        )
    };
}

/// The schema and the names in it, quoted.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    schema: String,
    prefix: String,
}

impl Names {
    pub(crate) fn new(schema: &str, prefix: &str) -> Self {
        Self {
            schema: schema.to_owned(),
            prefix: prefix.to_owned(),
        }
    }

    pub(crate) fn schema(&self) -> String {
        quoted(&self.schema)
    }

    /// `"schema"."prefix_name"`
    pub(crate) fn qualified(&self, name: &str) -> String {
        format!("{}.{}", quoted(&self.schema), self.bare(name))
    }

    fn bare(&self, name: &str) -> String {
        quoted(&format!("{}{name}", self.prefix))
    }

    /// Puts the names into a template: `{table}`, `{index!}` without the schema, `{table'}` as a string, and `{schema}`.
    pub(crate) fn fill(&self, template: &str) -> String {
        let mut text = String::with_capacity(template.len() * 2);
        let mut rest = template;
        while let Some((before, from)) = rest.split_once('{') {
            text.push_str(before);
            let name = from
                .split_once('}')
                .and_then(|(name, behind)| Some((self.name(name)?, behind)));
            rest = match name {
                Some((name, behind)) => {
                    text.push_str(&name);
                    behind
                }
                None => {
                    text.push('{');
                    from
                }
            };
        }
        text + rest
    }

    fn name(&self, name: &str) -> Option<String> {
        let word = name.trim_end_matches(['!', '\'']);
        let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if word.is_empty() || !word.bytes().all(is_word) {
            return None;
        }
        match &name[word.len()..] {
            "" if word == "schema" => Some(self.schema()),
            "" => Some(self.qualified(word)),
            "!" => Some(self.bare(word)),
            "'" => Some(literal(&self.qualified(word))),
            _ => None,
        }
    }

    fn statement(&self, template: &str) -> SqlStr {
        let text: Arc<str> = self.fill(template).into();
        AssertSqlSafe(text).into_sql_str()
    }
}

pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string. A backslash in a plain one means nothing while standard_conforming_strings is on; `E''` is clear always.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

macro_rules! statements {
    ($($(#[$doc:meta])* $name:ident: $sql:expr;)*) => {
        /// The statements.
        #[derive(Debug)]
        pub(crate) struct Sql {
            $($(#[$doc])* pub(crate) $name: SqlStr,)*
        }
        impl Sql {
            pub(crate) fn new(names: &Names) -> Self {
                Self { $($name: names.statement($sql),)* }
            }
        }
    };
}

/// Whether the lanes of a batch are still the session's: ?1 mailbox, ?2 owner, ?3 lanes, ?4 epochs.
macro_rules! fence {
    () => {
        "fence AS MATERIALIZED (SELECT count(*) = cardinality($3::int2[]) AS stands FROM unnest($3::int2[], $4::int8[]) f (lane, epoch) \
         JOIN {lane} l ON l.mailbox = $1 AND l.lane = f.lane AND l.owner = $2 AND l.epoch = f.epoch)"
    };
}

/// Rows of a table by lane and id, as something to join its `ctid` with. The planner may think that the table is empty, as
/// it was when it was last analyzed, and read all of it for each settle: here it has no choice. (?2 lanes, ?3 ids, and
/// whatever else there is of each.)
macro_rules! places {
    ($from:expr, $arrays:literal, $columns:literal) => {
        concat!(
            "(SELECT x.*, r.at FROM unnest($2::int2[], $3::int8[]", $arrays, ") x (lane, id", $columns, ") CROSS JOIN LATERAL (SELECT r.ctid AS at FROM ",
            $from, " ORDER BY r.id LIMIT 1) r OFFSET 0) u"
        )
    };
    (event $($more:literal)*) => { places!("{event} r WHERE r.mailbox = $1 AND r.lane = x.lane AND r.id = x.id" $(, $more)*) };
    (parked $($more:literal)*) => { places!("{parked} r WHERE r.id = x.id" $(, $more)*) };
    ($from:expr) => { places!($from, "", "") };
}

/// Whether a row of the parked is of a key.
macro_rules! of_key {
    ($row:literal, $key:literal) => {
        concat!(
            $row,
            ".key_hash = {key_hash}($1, ",
            $key,
            ".topic, ",
            $key,
            ".key) AND ",
            $row,
            ".key_hash IS NOT NULL AND ",
            $row,
            ".topic = ",
            $key,
            ".topic AND ",
            $row,
            ".key = ",
            $key,
            ".key"
        )
    };
}

/// The first of what is parked of the key `k`.
macro_rules! first_of_key {
    ($what:literal) => {
        concat!(
            "(SELECT ",
            $what,
            " FROM {parked} f WHERE ",
            of_key!("f", "k"),
            " AND f.state <> 3 ORDER BY f.id LIMIT 1)"
        )
    };
}

macro_rules! done_columns {
    () => {
        concat!(moved_columns!(""), ", attempts, errors, finished_at, slot")
    };
}

macro_rules! parked_columns {
    () => {
        concat!(moved_columns!(""), ", attempts, state, next_at, errors, finished_at")
    };
}

/// The last ten of the errors kept and those that are new.
macro_rules! last_errors {
    ($kept:literal, $new:literal) => {
        concat!(
            "(SELECT coalesce(jsonb_agg(x.e ORDER BY x.n), '[]') FROM (SELECT e, n FROM jsonb_array_elements(",
            $kept,
            " || ",
            $new,
            "::jsonb) WITH ORDINALITY j (e, n) ORDER BY n DESC LIMIT 10) x)"
        )
    };
}

statements! {
    add_mailbox: "INSERT INTO {mailbox} (name) VALUES ($1) ON CONFLICT (name) DO NOTHING RETURNING id";
    add_lanes: "INSERT INTO {lane} (mailbox, lane) SELECT $1, generate_series(0, 63) ON CONFLICT DO NOTHING";
    find_mailbox: "SELECT id FROM {mailbox} WHERE name = $1";

    // Appending, by the name of the mailbox: its row may have gone since anybody looked, and then this inserts nothing. One
    // row has a statement of its own, which is cheaper to run.
    append_one: "INSERT INTO {event} (mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload, created_at) \
        SELECT id, $2::int2, $3::uuid, $4::text, $5::text, $6::text, $7::text, $8::text, $9::text, $10::timestamptz, $11::bytea, {clock}() FROM {mailbox} WHERE name = $1";
    append_many: "INSERT INTO {event} (mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload, created_at) \
        SELECT m.id, lane, message_id, topic, type, source, key, content_type, headers, time, payload, {clock}() \
        FROM {mailbox} m CROSS JOIN unnest($2::int2[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::timestamptz[], $11::bytea[]) \
        WITH ORDINALITY u (lane, message_id, topic, type, source, key, content_type, headers, time, payload, n) WHERE m.name = $1 ORDER BY n";
    schedule: "INSERT INTO {scheduled} (mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload, created_at, due_at) \
        SELECT m.id, lane, message_id, topic, type, source, key, content_type, headers, time, payload, {clock}(), {clock}() + make_interval(secs => after) \
        FROM {mailbox} m CROSS JOIN unnest($2::int2[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::timestamptz[], $11::bytea[], $12::float8[]) \
        WITH ORDINALITY u (lane, message_id, topic, type, source, key, content_type, headers, time, payload, after, n) WHERE m.name = $1 ORDER BY n";
    /// Parks what is not parked yet: unique by message id, whose lock the transaction holds.
    park_new: concat!(
        "INSERT INTO {parked} (", parked_columns!(), ") ",
        "SELECT $1, lane, nextval({position'}), message_id, topic, type, source, key, content_type, headers, time, payload, {clock}(), ",
        "attempts, state, CASE WHEN state = 0 THEN {clock}() + make_interval(secs => after) END, errors::jsonb, CASE WHEN state >= 3 THEN {clock}() END ",
        "FROM (SELECT DISTINCT ON (message_id) * FROM unnest($2::int2[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], ",
        "$10::timestamptz[], $11::bytea[], $12::float8[], $13::int4[], $14::int2[], $15::text[]) WITH ORDINALITY ",
        "u (lane, message_id, topic, type, source, key, content_type, headers, time, payload, after, attempts, state, errors, n) ORDER BY message_id, n) u ",
        "LEFT JOIN LATERAL (SELECT true AS yes FROM {parked} p WHERE p.message_id = u.message_id AND p.mailbox + 0 = $1 LIMIT 1) p ON true WHERE p.yes IS NULL ORDER BY n",
    );
    /// Locks by which those who park and unpark take turns: of keys and of message ids. In the order given.
    lock: "SELECT current_setting('transaction_isolation'), count(pg_advisory_xact_lock({parked'}::regclass::oid::int4, h)), \
        CASE WHEN current_setting('idle_in_transaction_session_timeout') = '0' THEN set_config('idle_in_transaction_session_timeout', '30s', true) END \
        FROM unnest($1::int4[]) h";
    /// Of these those that nobody else has.
    try_lock: "SELECT h FROM unnest($1::int4[]) h WHERE pg_try_advisory_xact_lock({parked'}::regclass::oid::int4, h)";

    // The lanes.
    lock_mailbox: "SELECT 1 FROM {mailbox} WHERE id = $1 FOR UPDATE";
    forget_expired: "DELETE FROM {relay} WHERE mailbox = $1 AND (expires_at <= {clock}() OR owner = ANY($2))";
    register: "INSERT INTO {relay} (mailbox, owner, expires_at) VALUES ($1, $2, {clock}() + make_interval(secs => $3)) ON CONFLICT (mailbox, owner) DO NOTHING";
    unregister: "DELETE FROM {relay} WHERE mailbox = $1 AND owner = $2";
    count_relays: "SELECT count(*) FROM {relay} WHERE mailbox = $1";
    /// Lanes to be had, and whether nobody has owned them for a while.
    takeable: "SELECT lane, owner IS NULL, freed_at < {clock}() - make_interval(secs => $2) FROM {lane} l WHERE mailbox = $1 \
        AND (owner IS NULL OR NOT EXISTS (SELECT 1 FROM {relay} r WHERE r.mailbox = $1 AND r.owner = l.owner)) ORDER BY lane";
    take: "UPDATE {lane} SET owner = $2, epoch = epoch + 1 WHERE mailbox = $1 AND lane = ANY($3) RETURNING lane, epoch";
    free: "UPDATE {lane} SET owner = NULL, freed_at = {clock}() WHERE mailbox = $1 AND owner = $2 AND lane = ANY($3)";
    free_all: "UPDATE {lane} SET owner = NULL, freed_at = {clock}() WHERE mailbox = $1 AND owner = $2";
    renew: "UPDATE {relay} SET expires_at = {clock}() + make_interval(secs => $3) WHERE mailbox = $1 AND owner = $2 AND expires_at > {clock}() \
        AND EXISTS (SELECT 1 FROM {mailbox} m WHERE m.id = $1 AND m.name = $4) RETURNING (SELECT count(*) FROM {relay} WHERE mailbox = $1 AND expires_at > {clock}())";

    // The settled floor (of a transaction the number of the outermost, which is the oldest): the position first, then who might still commit one below it. Two statements in one message.
    probe: "SELECT last_value - (NOT is_called)::int4, {clock}(), pg_postmaster_start_time()::text, \
            (SELECT seqcache > 1 FROM pg_sequence WHERE seqrelid = {position'}::regclass) FROM {position}; \
        SELECT l.virtualtransaction, (SELECT x.transactionid::text FROM pg_locks x WHERE x.locktype = 'transactionid' AND x.granted \
            AND x.mode = 'ExclusiveLock' AND x.virtualtransaction = l.virtualtransaction ORDER BY age(x.transactionid) DESC LIMIT 1) \
        FROM pg_locks l WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' \
        AND l.relation IN ({event'}::regclass, {parked'}::regclass, {scheduled'}::regclass) \
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND l.pid IS DISTINCT FROM pg_backend_pid()";

    /// Whether there is anything below the cursors that is not known, as there never should be: ?2 lanes, ?3 cursors, ?4 what is known.
    has_strays: "SELECT EXISTS (SELECT 1 FROM unnest($2::int2[], $3::int8[]) l (lane, cursor) CROSS JOIN LATERAL \
        (SELECT 1 FROM {event} e WHERE e.mailbox = $1 AND e.lane = l.lane AND e.id <= l.cursor AND e.id NOT IN (SELECT unnest($4::int8[])) ORDER BY e.id LIMIT 1) e)";
    /// Ids are never used again: a sequence that was set back goes on behind what is parked, and what came since, up to ?1, gets ids behind.
    raise_position: "SELECT last_value, setval({position'}, m) FROM (SELECT max(id) AS m FROM {parked}) x, {position} WHERE m > last_value";
    renumber: concat!(
        "WITH since AS (DELETE FROM {event} e WHERE e.id <= $1 RETURNING e.*) ",
        "INSERT INTO {event} (", event_columns!(), ", errors) SELECT ", event_columns!(), ", errors FROM since ORDER BY id",
    );

    // Claiming.
    /// What is next: ?2 lanes, ?3 their cursors, ?4 the most rows a lane, ?5 the most rows. Large payloads are left out.
    fetch: &fetch("");
    /// The same around what is known already: ?6.
    fetch_around: &fetch("AND e.id NOT IN (SELECT unnest($6::int8[]))");
    /// With large payloads, and up to so many bytes: ?7.
    fetch_large: concat!(
        "SELECT ", message_columns!("e."), ", e.at FROM (SELECT e.*, sum(octet_length(e.payload)) OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before ",
        "FROM (SELECT e.* FROM unnest($2::int2[], $3::int8[]) l (lane, cursor) CROSS JOIN LATERAL (SELECT *, e.ctid AS at FROM {event} e WHERE e.mailbox = $1 AND e.lane = l.lane ",
        "AND e.id > l.cursor AND e.id NOT IN (SELECT unnest($6::int8[])) ORDER BY e.id LIMIT $4) e LIMIT $5) e) e WHERE coalesce(e.before, 0) < $7",
    );
    events_by_id: concat!(
        "SELECT ", message_columns!("e."), ", e.at FROM unnest($2::int2[], $3::int8[]) u (lane, id) CROSS JOIN LATERAL (SELECT *, e.ctid AS at FROM {event} e ",
        "WHERE e.mailbox = $1 AND e.lane = u.lane AND e.id = u.id LIMIT 1) e ORDER BY e.id",
    );
    /// Keys that have been parked by others: ?2 lanes, ?3 up to where they are known.
    newly_parked: "SELECT p.lane, p.id, p.topic, p.key FROM unnest($2::int2[], $3::int8[]) l (lane, cursor) CROSS JOIN LATERAL \
        (SELECT lane, id, topic, key FROM {parked} p WHERE p.mailbox = $1 AND p.lane = l.lane AND p.id > l.cursor AND p.state <> 3 AND p.key IS NOT NULL ORDER BY p.id) p";
    parked_keys: "SELECT lane, max(id), topic, key FROM {parked} WHERE mailbox = $1 AND lane = ANY($2) AND state <> 3 AND key IS NOT NULL GROUP BY lane, topic, key";
    waiting_topics: "SELECT DISTINCT topic FROM {parked} WHERE mailbox = $1 AND state = 2 AND lane = ANY($2)";
    /// When what waits becomes due: ?2 lanes, ?3 and ?4 from when on to look, ?5 what is out.
    next_due: "SELECT {clock}(), \
        (SELECT min(d.at) FROM unnest($2::int2[]) l (lane) CROSS JOIN LATERAL (SELECT p.next_at AS at FROM {parked} p WHERE p.mailbox = $1 AND p.lane = l.lane \
            AND p.state = 0 AND p.next_at >= $3 AND p.id NOT IN (SELECT unnest($5::int8[])) ORDER BY p.next_at LIMIT 1) d), \
        (SELECT min(d.at) FROM unnest($2::int2[]) l (lane) CROSS JOIN LATERAL (SELECT s.due_at AS at FROM {scheduled} s WHERE s.mailbox = $1 AND s.lane = l.lane \
            AND s.due_at >= $4 ORDER BY s.due_at LIMIT 1) d)";
    due_heads: "SELECT h.lane, h.id, h.topic, h.key, h.next_at FROM unnest($2::int2[]) l (lane) CROSS JOIN LATERAL (SELECT * FROM {parked} p WHERE p.mailbox = $1 \
        AND p.lane = l.lane AND p.state = 0 AND p.next_at >= $3 AND p.next_at <= $4 AND p.id NOT IN (SELECT unnest($6::int8[])) ORDER BY p.next_at, p.id LIMIT $5) h \
        ORDER BY h.next_at, h.id LIMIT $5";
    /// Heads with what waits behind them: ?2 lanes, ?3 ids, ?4 topics, ?5 keys, ?6 the most of each, ?7 how many bytes.
    runs: concat!(
        "SELECT * FROM (SELECT r.*, sum(octet_length(r.payload)) OVER (ORDER BY r.n, r.id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before FROM (SELECT ", message_columns!("p."), ", p.attempts, p.state, u.n FROM unnest($2::int2[], $3::int8[], $4::text[], $5::text[]) WITH ORDINALITY u (lane, id, topic, key, n) ",
        "CROSS JOIN LATERAL (SELECT * FROM {parked} p WHERE ", of_key!("p", "u"), " AND p.state <> 3 ",
        "AND p.id >= u.id ORDER BY p.id LIMIT $6) p WHERE u.key IS NOT NULL ",
        "UNION ALL SELECT ", message_columns!("p."), ", p.attempts, p.state, u.n FROM unnest($2::int2[], $3::int8[], $4::text[], $5::text[]) WITH ORDINALITY u (lane, id, topic, key, n) ",
        "CROSS JOIN LATERAL (SELECT * FROM {parked} p WHERE p.id = u.id ORDER BY p.id LIMIT 1) p WHERE u.key IS NULL) r) r WHERE coalesce(r.before, 0) < $7 ORDER BY r.n, r.id",
    );
    /// Scheduled rows whose time has come enter the event table: ?2 owner, ?3 lanes, ?4 epochs, ?5 and ?6 from and to when, ?7 the most.
    enter_scheduled: concat!(
        "WITH ", fence!(), ", due AS MATERIALIZED (SELECT s.at FROM unnest($3::int2[]) l (lane) CROSS JOIN LATERAL (SELECT s.ctid AS at, s.id, s.due_at FROM {scheduled} s ",
        "WHERE s.mailbox = $1 AND s.lane = l.lane AND s.due_at >= $5 AND s.due_at <= $6 ORDER BY s.due_at, s.id LIMIT $7) s ",
        "WHERE (SELECT stands FROM fence) ORDER BY s.due_at, s.id LIMIT $7), ",
        "gone AS (DELETE FROM {scheduled} s USING due u WHERE s.ctid = u.at RETURNING s.*), ",
        "entered AS (INSERT INTO {event} (", event_columns!(), ") SELECT ", event_columns!(), " FROM gone ORDER BY due_at, id) ",
        "SELECT count(*), max(due_at) FROM gone",
    );

    // Settling. ?1 mailbox, ?2 owner, ?3 lanes, ?4 epochs.
    /// Of the rows that lie at ?6 those with the ids ?5.
    delete_done: &delete_done(IN_PLACE);
    keep_done: &keep_done(IN_PLACE);
    /// Those with the lanes ?6 and the ids ?5, wherever they lie.
    delete_done_moved: &delete_done(MOVED);
    keep_done_moved: &keep_done(MOVED);
    fence: concat!("WITH ", fence!(), " SELECT stands FROM fence");
    /// In a transaction that writes more than this: nobody takes the lanes until it ends.
    lock_fence: "SELECT f.lane FROM unnest($3::int2[], $4::int8[]) f (lane, epoch) \
        JOIN {lane} l ON l.mailbox = $1 AND l.lane = f.lane AND l.owner = $2 AND l.epoch = f.epoch FOR SHARE OF l";
    /// Records of the parked table that are done: ?2 and ?3 lane and id of each.
    delete_done_parked: concat!("DELETE FROM {parked} p USING ", places!(parked), " WHERE p.ctid = u.at");
    keep_done_parked: concat!(
        "WITH gone AS (DELETE FROM {parked} p USING ", places!(parked), " WHERE p.ctid = u.at RETURNING p.*) ",
        "INSERT INTO {done} (", done_columns!(), ") SELECT ", moved_columns!(""), ", attempts, errors, {clock}(), (SELECT {slot}()) FROM gone",
    );
    /// From the event table to the parked: ?4 attempts, ?5 states, ?6 delays, ?7 errors.
    park: concat!(
        "WITH gone AS (DELETE FROM {event} e USING ",
        places!(event ", $4::int4[], $5::int2[], $6::float8[], $7::text[]" ", attempts, state, after, added"),
        " WHERE e.ctid = u.at RETURNING e.*, u.attempts, u.state, u.after, u.added) ",
        "INSERT INTO {parked} (", parked_columns!(), ") SELECT ", moved_columns!(""), ", attempts, state, ",
        "CASE WHEN state = 0 THEN {clock}() + make_interval(secs => after) END, ",
        "CASE WHEN errors IS NULL THEN added::jsonb ELSE ", last_errors!("errors", "added"), " END, CASE WHEN state >= 3 THEN {clock}() END FROM gone",
    );
    set_parked: concat!(
        "UPDATE {parked} p SET attempts = u.attempts, state = u.state, next_at = CASE WHEN u.state = 0 THEN {clock}() + make_interval(secs => u.after) END, ",
        "errors = ", last_errors!("p.errors", "u.errors"), ", finished_at = CASE WHEN u.state >= 3 THEN {clock}() END FROM ",
        places!(parked ", $4::int4[], $5::int2[], $6::float8[], $7::text[]" ", attempts, state, after, errors"), " WHERE p.ctid = u.at",
    );
    /// Heads that were not attempted are due as they were, but not before the floor.
    give_back_parked: concat!("UPDATE {parked} p SET next_at = greatest(p.next_at, {clock}()) FROM ", places!(parked), " WHERE p.ctid = u.at AND p.state = 0");
    park_behind: concat!(
        "WITH gone AS (DELETE FROM {event} e USING ", places!(event), " WHERE e.ctid = u.at RETURNING e.*) ",
        "INSERT INTO {parked} (", parked_columns!(), ") SELECT ", moved_columns!(""), ", 0, 1, NULL, coalesce(errors, '[]'), NULL FROM gone RETURNING lane, topic, key",
    );
    /// Of what is parked of a key the first, and only the first, is a head: ?2 lanes, ?3 topics, ?4 keys.
    demote: concat!(
        "UPDATE {parked} p SET state = 1, next_at = NULL FROM (SELECT h.at FROM unnest($2::int2[], $3::text[], $4::text[]) k (lane, topic, key) CROSS JOIN LATERAL ",
        "(SELECT h.ctid AS at FROM {parked} h WHERE ", of_key!("h", "k"), " AND h.state IN (0, 2) ",
        "AND h.id > ", first_of_key!("f.id"), " ORDER BY h.id) h OFFSET 0) u WHERE p.ctid = u.at",
    );
    promote: concat!(
        "UPDATE {parked} p SET state = 0, next_at = {clock}() FROM (SELECT ", first_of_key!("f.ctid"), " AS at FROM unnest($2::int2[], $3::text[], $4::text[]) k (lane, topic, key) OFFSET 0) u ",
        "WHERE p.ctid = u.at AND p.state = 1",
    );
    /// Which of these keys have something parked that keeps their place: ?2 lanes, ?3 topics, ?4 keys.
    still_parked: concat!(
        "SELECT k.lane, k.topic, k.key FROM unnest($2::int2[], $3::text[], $4::text[]) k (lane, topic, key) CROSS JOIN LATERAL ",
        "(SELECT 1 FROM {parked} f WHERE ", of_key!("f", "k"), " AND f.state <> 3 ORDER BY f.id LIMIT 1) f",
    );
    resume: "UPDATE {parked} p SET state = 0, next_at = {clock}() FROM (SELECT r.ctid AS at FROM {parked} r WHERE r.mailbox = $1 AND r.topic = $2 AND r.state = 2 AND r.lane = ANY($3) \
        ORDER BY r.id LIMIT $4) u WHERE p.ctid = u.at AND p.state = 2";

    // The inbox, by the name of its mailbox.
    /// ?2 message ids, ?3 topics, ?4 keys, ?5 whether it is what is parked itself. Gives for each, in order: 0 new, 1 duplicate, 2 parked, 3 held back.
    admit: "SELECT a.answer FROM {mailbox} m CROSS JOIN LATERAL {admit}(m.id, $2, $3, $4, $5) WITH ORDINALITY a (answer, n) WHERE m.name = $1 ORDER BY a.n";
    /// ?2 message ids, ?3 topics, ?4 keys. Gives what is known of them: 1 a duplicate and its id, 2 parked and its id, 3 a topic and key that hold back.
    look: "SELECT l.* FROM {mailbox} m CROSS JOIN LATERAL {look}(m.id, $2, $3, $4) l WHERE m.name = $1";
    note: "SELECT version, body FROM {note} WHERE mailbox = (SELECT id FROM {mailbox} WHERE name = $1) AND message_id = $2";
    add_note: "INSERT INTO {note} (mailbox, message_id, version, body, written_at) SELECT id, $2::uuid, 1, $3::text, {clock}() FROM {mailbox} WHERE name = $1 ON CONFLICT DO NOTHING";
    set_note: "UPDATE {note} SET version = version + 1, body = $3, written_at = {clock}() WHERE mailbox = (SELECT id FROM {mailbox} WHERE name = $1) AND message_id = $2 AND version = $4";
    /// ?1 group, ?2 owner, ?3 types, ?4 topics, ?5 the retention. A member that was unseen for longer starts anew.
    register_member: "WITH gone AS (DELETE FROM {member} WHERE group_name = $1 AND owner IN (SELECT owner FROM {member} \
            WHERE group_name = $1 AND owner <> $2 AND seen_at < {clock}() - make_interval(secs => $5) FOR UPDATE SKIP LOCKED)) \
        INSERT INTO {member} AS m (group_name, owner, types, topics, registered_at, seen_at) SELECT $1, $2, $3, $4, c, c FROM {clock}() c \
        ON CONFLICT (group_name, owner) DO UPDATE SET types = EXCLUDED.types, topics = EXCLUDED.topics, seen_at = EXCLUDED.seen_at, registered_at = \
            CASE WHEN m.seen_at < EXCLUDED.seen_at - make_interval(secs => $5) THEN EXCLUDED.registered_at ELSE m.registered_at END";
    members: "SELECT owner, types, topics, extract(epoch FROM c - registered_at)::float8, extract(epoch FROM c - seen_at)::float8 \
        FROM {clock}() c, {member} WHERE group_name = $1 AND seen_at >= c - make_interval(secs => $2) ORDER BY registered_at, owner";
    purge_notes: "DELETE FROM {note} r USING (SELECT n.mailbox, n.message_id FROM {note} n WHERE n.mailbox = $1 AND n.written_at <= {clock}() - make_interval(secs => $2) \
        AND NOT EXISTS (SELECT 1 FROM {parked} p WHERE p.message_id = n.message_id AND p.mailbox + 0 = n.mailbox) ORDER BY written_at LIMIT $3 FOR UPDATE SKIP LOCKED) o WHERE r.mailbox = o.mailbox AND r.message_id = o.message_id";
    purge_receipts: "DELETE FROM {receipt} r USING (SELECT mailbox, message_id FROM {receipt} WHERE mailbox = $1 AND seen_at <= {clock}() - make_interval(secs => $2) \
        ORDER BY seen_at LIMIT $3 FOR UPDATE SKIP LOCKED) o WHERE r.mailbox = o.mailbox AND r.message_id = o.message_id";

    // Cleaning up.
    purge_done: "DELETE FROM {done} d USING (SELECT slot, ctid AS at FROM {done} WHERE mailbox = $1 AND finished_at <= {clock}() - make_interval(secs => $2) LIMIT $3 FOR UPDATE SKIP LOCKED) o \
        WHERE d.slot = o.slot AND d.ctid = o.at";
    /// Mailboxes that have events and do not exist: a foreign key would lock the mailbox's row for every append.
    unknown_mailboxes: "WITH RECURSIVE m (id) AS ((SELECT mailbox FROM {event} ORDER BY mailbox LIMIT 1) UNION ALL \
        SELECT (SELECT e.mailbox FROM {event} e WHERE e.mailbox > m.id ORDER BY e.mailbox LIMIT 1) FROM m WHERE m.id IS NOT NULL) \
        SELECT id FROM m WHERE id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM {mailbox} b WHERE b.id = m.id)";
    history_slot: "SELECT value, (SELECT {slot}()) FROM {settings} WHERE name = 'history_slot_seconds'";
    set_history_slot: "UPDATE {settings} SET value = $1 WHERE name = 'history_slot_seconds'";
    old_failed: "SELECT lane, id, topic, key FROM {parked} WHERE mailbox = $1 AND state >= 3 AND finished_at <= {clock}() - make_interval(secs => $2) ORDER BY finished_at LIMIT $3";

    // Administration. ?2 topic, ?3 type, ?4 key, ?5 message ids, ?6 the most.
    failed: "SELECT lane, id, topic, key FROM {parked} WHERE mailbox = $1 AND state >= 3 AND ($2::text IS NULL OR topic = $2) AND ($3::text IS NULL OR type = $3) \
        AND ($4::text IS NULL OR key = $4) AND ($5::uuid[] IS NULL OR message_id = ANY($5)) ORDER BY id LIMIT $6";
    count_failed: "SELECT count(*) FROM {parked} WHERE mailbox = $1 AND state >= 3 AND ($2::text IS NULL OR topic = $2) AND ($3::text IS NULL OR type = $3) \
        AND ($4::text IS NULL OR key = $4) AND ($5::uuid[] IS NULL OR message_id = ANY($5))";
    /// Those of them that are still there: ?2 lanes, ?3 ids. In an outbox one that did not hold its key is an event again, at the end.
    /// What no event may be (its topic is none, say) stays, to fail again.
    requeue: concat!(
        "WITH gone AS (DELETE FROM {parked} p USING ", places!(parked), " WHERE p.ctid = u.at AND p.state = 3 AND octet_length(p.type) BETWEEN 1 AND 255 ",
        "AND octet_length(p.topic) BETWEEN 1 AND 200 AND p.topic ~ '^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$' AND left(p.headers, 1) = '[' ",
        "AND coalesce(octet_length(p.key) BETWEEN 1 AND 512, true) AND coalesce(p.time BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00', true) RETURNING p.*) ",
        "INSERT INTO {event} (", event_columns!(), ", errors) SELECT ", event_columns!(), ", errors FROM gone ORDER BY id",
    );
    /// And the others. One that held its key goes on in its place, another enters at the end.
    redrive: concat!(
        "UPDATE {parked} p SET id = CASE WHEN p.state = 4 THEN p.id ELSE nextval({position'}) END, state = 0, attempts = 0, next_at = {clock}(), finished_at = NULL FROM ",
        places!(parked), " WHERE p.ctid = u.at AND p.state >= 3",
    );
    discard: concat!("DELETE FROM {parked} p USING ", places!(parked), " WHERE p.ctid = u.at AND p.state >= 3");
    list: &list();
    mailboxes: "SELECT name FROM {mailbox}";
    stats: "SELECT m.name, \
        (SELECT count(*) FROM {event} WHERE mailbox = m.id), \
        (SELECT count(*) FROM {parked} WHERE mailbox = m.id AND state < 3), \
        (SELECT count(*) FROM {scheduled} WHERE mailbox = m.id), \
        (SELECT count(*) FROM {parked} WHERE mailbox = m.id AND state >= 3), \
        (SELECT count(*) FROM {done} WHERE mailbox = m.id), \
        extract(epoch FROM {clock}())::float8 - extract(epoch FROM least((SELECT min(created_at) FROM {event} WHERE mailbox = m.id), \
            (SELECT min(created_at) FROM {parked} WHERE mailbox = m.id AND state < 3)))::float8 \
        FROM {mailbox} m";

    /// Which of the sessions of this process have something to claim, or have read up to where nothing can have been. ?1 session, ?2 mailbox, ?3 lane, ?4 cursor, ?5 and ?6 from when on to look;
    /// ?7 and ?8 session and mailbox of those that do not own every lane.
    poll: "SELECT s.n FROM unnest($1::int4[], $2::int2[], $3::int2[], $4::int8[]) s (n, mailbox, lane, cursor) \
        WHERE EXISTS (SELECT 1 FROM {event} e WHERE e.mailbox = s.mailbox AND e.lane = s.lane AND e.id > s.cursor) \
        UNION SELECT s.n FROM unnest($1::int4[], $2::int2[], $3::int2[], $5::timestamptz[], $6::timestamptz[]) s (n, mailbox, lane, parked, scheduled) \
        WHERE EXISTS (SELECT 1 FROM {parked} p WHERE p.mailbox = s.mailbox AND p.lane = s.lane AND p.state = 0 AND p.next_at >= s.parked AND p.next_at <= (SELECT {clock}())) \
            OR EXISTS (SELECT 1 FROM {scheduled} d WHERE d.mailbox = s.mailbox AND d.lane = s.lane AND d.due_at >= s.scheduled AND d.due_at <= (SELECT {clock}())) \
        UNION SELECT s.n FROM unnest($1::int4[], $4::int8[]) s (n, cursor) WHERE s.cursor > (SELECT last_value FROM {position}) \
        UNION SELECT s.n FROM unnest($7::int4[], $8::int2[]) s (n, mailbox) WHERE EXISTS (SELECT 1 FROM {lane} l WHERE l.mailbox = s.mailbox \
            AND (l.owner IS NULL OR NOT EXISTS (SELECT 1 FROM {relay} r WHERE r.mailbox = l.mailbox AND r.owner = l.owner AND r.expires_at > (SELECT {clock}()))))";
}

/// The double negation keeps the planner from making a join of it, whose order would follow its statistics.
const IN_PLACE: &str = "e.ctid = ANY($6::tid[]) AND NOT (e.id NOT IN (SELECT unnest($5::int8[])))";
const MOVED: &str = "e.ctid = ANY(ARRAY(SELECT r.at FROM unnest($6::int2[], $5::int8[]) x (lane, id) CROSS JOIN LATERAL \
    (SELECT r.ctid AS at FROM {event} r WHERE r.mailbox = $1 AND r.lane = x.lane AND r.id = x.id LIMIT 1) r))";

/// Deletes what is done, if the fence stands. RETURNING costs each row a look, so it is the number of rows that tells
/// whether all went well.
fn delete_done(which: &str) -> String {
    const FENCE: &str = fence!();
    format!("WITH {FENCE} DELETE FROM {{event}} e WHERE {which} AND (SELECT stands FROM fence)")
}

fn keep_done(which: &str) -> String {
    const COLUMNS: &str = done_columns!();
    const MOVED: &str = moved_columns!("");
    let delete = delete_done(which)
        .replacen("DELETE", "gone AS (DELETE", 1)
        .replacen(" gone AS", ", gone AS", 1);
    format!(
        "{delete} RETURNING e.*) INSERT INTO {{done}} ({COLUMNS}) SELECT {MOVED}, 0, coalesce(errors, '[]'), {{clock}}(), (SELECT {{slot}}()) FROM gone"
    )
}

/// Payloads up to this are small: a claim of a thousand of them is no burden.
pub(crate) const SMALL_PAYLOAD: usize = 16 * 1024;

fn fetch(but_for: &str) -> String {
    const COLUMNS: &str = message_columns!("e.");
    let columns = COLUMNS.replace(
        "e.payload",
        &format!("CASE WHEN octet_length(e.payload) <= {SMALL_PAYLOAD} THEN e.payload END"),
    );
    format!(
        "SELECT {columns}, e.at FROM unnest($2::int2[], $3::int8[]) l (lane, cursor) CROSS JOIN LATERAL (SELECT *, e.ctid AS at FROM {{event}} e WHERE e.mailbox = $1 \
         AND e.lane = l.lane AND e.id > l.cursor {but_for} ORDER BY e.id LIMIT $4) e LIMIT $5"
    )
}

/// A page of everything in a mailbox: ?1 mailbox, ?2 part and ?3 id to begin behind, ?4 topic, ?5 type, ?6 key, ?7 ids,
/// ?8 state (0 pending, 1 succeeded, 2 failed), ?9 limit. Part 0 is ordered by the common ids, part 1 is what is
/// scheduled, whose ids are its own.
fn list() -> String {
    let part = |part: u8, table: &str, of: &str, columns: &str, by_lane: bool| {
        let lanes = if by_lane {
            "generate_series(0, 63) l (lane)"
        } else {
            "(SELECT 1) l"
        };
        let lane = if by_lane { "t.lane = l.lane AND" } else { "" };
        format!(
            concat!(
                "SELECT * FROM (SELECT {part} AS part, t.* FROM {lanes} CROSS JOIN LATERAL (SELECT ",
                message_columns!("t."),
                ", t.created_at, {columns} FROM {table} t ",
                "WHERE t.mailbox = $1 AND {lane} ($2 < {part} OR ($2 = {part} AND t.id > $3)) ",
                "AND ($4::text IS NULL OR t.topic = $4) AND ($5::text IS NULL OR t.type = $5) AND ($6::text IS NULL OR t.key = $6) ",
                "AND ($7::uuid[] IS NULL OR t.message_id = ANY($7)) ",
                "AND ($8::int4 IS NULL OR $8 = {of}) ORDER BY t.id LIMIT $9) t ORDER BY t.id LIMIT $9) t"
            ),
            part = part,
            columns = columns,
            table = table,
            lanes = lanes,
            lane = lane,
            of = of,
        )
    };
    const FAILED: &str = "CASE WHEN t.state >= 3 THEN 2 ELSE 0 END";
    let parked = format!("t.attempts, t.errors::text, t.next_at, t.finished_at, {FAILED} AS state");
    [
        part(
            0,
            "{event}",
            "0",
            "0 AS attempts, coalesce(t.errors::text, '[]') AS errors, NULL::timestamptz, NULL::timestamptz, 0 AS state",
            true,
        ),
        part(0, "{parked}", FAILED, &parked, true),
        part(
            0,
            "{done}",
            "1",
            "t.attempts, t.errors::text, NULL::timestamptz, t.finished_at, 1 AS state",
            false,
        ),
        part(
            1,
            "{scheduled}",
            "0",
            "0, '[]', t.due_at, NULL::timestamptz, 0 AS state",
            false,
        ),
    ]
    .join(" UNION ALL ")
        + " ORDER BY 1, 3 LIMIT $9"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_filled_in_and_quoted() {
        let names = Names::new("sch\"ema", "a'b_");
        assert_eq!(
            names.fill("{schema} {event} {parked_due!} '{}' {A}"),
            "\"sch\"\"ema\" \"sch\"\"ema\".\"a'b_event\" \"a'b_parked_due\" '{}' {A}"
        );
        let sql = Sql::new(&names);
        for statement in [&sql.list, &sql.fetch, &sql.fetch_around, &sql.poll, &sql.keep_done] {
            assert!(!statement.as_str().contains('{'), "{}", statement.as_str());
        }
    }
}
