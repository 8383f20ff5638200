//! Every statement, with the names filled in: the one place where identifiers become SQL.

use sqlx::{AssertSqlSafe, SqlSafeStr as _, SqlStr};
use std::sync::Arc;

/// The columns that make a message, in the order [`row::message`](crate::row::message) reads them, behind the id.
macro_rules! message_columns {
    () => {
        "message_id, topic, type, source, key, content_type, headers, time, payload"
    };
}

/// What [`row::Packed`](crate::row::Packed) reads.
macro_rules! packed_event {
    () => {
        "json_group_array(json_array(id, is_parked, hex(message_id), topic, type, source, key, content_type, headers, time, length(payload))), \
         CAST(group_concat(payload, '') AS BLOB)"
    };
}

macro_rules! first_of_key {
    () => {
        "(SELECT min(id) FROM {parked} INDEXED BY {parked_key} \
         WHERE mailbox = ?1 AND topic = ?2 AND key = ?3 AND state <> 3 AND key IS NOT NULL)"
    };
}

macro_rules! fence_stands {
    () => {
        "EXISTS (SELECT 1 FROM {mailbox} WHERE id = ?1 AND owner = ?4 AND epoch = ?5)"
    };
}

/// The tables by the names they have under a prefix, quoted.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    prefix: String,
}

impl Names {
    pub(crate) fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
        }
    }

    fn quoted(&self, name: &str) -> String {
        format!("\"{}{name}\"", self.prefix.replace('"', "\"\""))
    }

    /// Puts the names into `{table}`s.
    pub(crate) fn fill(&self, template: &str) -> SqlStr {
        const NAMES: [&str; 19] = [
            "meta",
            "mailbox",
            "event_mailbox",
            "event",
            "parked_due",
            "parked_key",
            "parked_failed",
            "parked_topic",
            "parked_message",
            "parked",
            "scheduled_due",
            "scheduled",
            "receipt_seen",
            "note_written",
            "note",
            "member",
            "receipt",
            "done_finished",
            "done",
        ];
        let mut text = template.to_owned();
        for name in NAMES {
            text = text.replace(&format!("{{{name}}}"), &self.quoted(name));
        }
        // As a string, where SQLite's own table of sequences asks for it.
        let sequence = format!("'{}event'", self.prefix.replace('\'', "''"));
        let text: Arc<str> = text.replace("{'event'}", &sequence).into();
        AssertSqlSafe(text).into_sql_str()
    }
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
                Self { $($name: names.fill($sql),)* }
            }
        }
    };
}

statements! {
    add_mailbox: "INSERT INTO {mailbox} (name) VALUES (?1) ON CONFLICT (name) DO NOTHING";
    find_mailbox: "SELECT id FROM {mailbox} WHERE name = ?1";

    // Appending: eleven values a row, of which the first is the name of the mailbox. Where its row has gone, this violates NOT NULL.
    append_1: &insert_events(1);
    append_4: &insert_events(4);
    append_16: &insert_events(16);
    append_64: &insert_events(64);
    schedule: concat!(
        "INSERT INTO {scheduled} (mailbox, ", message_columns!(), ", created_at, due_at) ",
        "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
    );
    is_parked_message: "SELECT EXISTS (SELECT 1 FROM {parked} WHERE mailbox = ?1 AND message_id = ?2)";
    next_id: "UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = {'event'} RETURNING seq";
    // A sequence that was set back (`DELETE FROM sqlite_sequence`) goes on behind every id that is in use, and the events of
    // a mailbox that are not among ?2 get ids behind those, in their order.
    add_sequence: "INSERT INTO sqlite_sequence (name, seq) SELECT {'event'}, 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = {'event'})";
    raise_sequence: "UPDATE sqlite_sequence SET seq = max(seq, ?1, (SELECT coalesce(max(id), 0) FROM {event}), (SELECT coalesce(max(id), 0) FROM {parked}), \
        (SELECT coalesce(max(id), 0) FROM {done})) WHERE name = {'event'} RETURNING seq";
    renumber: "UPDATE {event} SET id = id + ?3 WHERE id IN (SELECT id FROM {event} INDEXED BY {event_mailbox} WHERE mailbox = ?1 \
        AND id NOT IN (SELECT value FROM json_each(?2)))";
    has_ids_twice: "SELECT EXISTS (SELECT 1 FROM {parked} p CROSS JOIN {event} e WHERE e.id = p.id)";
    park_new: concat!(
        "INSERT INTO {parked} (id, mailbox, ", message_columns!(), ", created_at, attempts, state, due_at, errors, finished_at) ",
        "VALUES (?12, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?13, ?14, ?15, ?16, ?17)",
    );

    // The lease.
    read_lease: "SELECT owner, epoch, beat, lease_ms, id FROM {mailbox} WHERE name = ?1";
    take_lease:
        "UPDATE {mailbox} SET owner = ?2, epoch = max(epoch, ?4) + 1, beat = beat + 1, lease_ms = ?3 WHERE id = ?1 RETURNING epoch";
    renew_lease: "UPDATE {mailbox} SET beat = beat + 1 WHERE id = ?1 AND owner = ?2 AND epoch = ?3 AND name = ?4";
    free_lease: "UPDATE {mailbox} SET owner = NULL WHERE id = ?1 AND owner = ?2 AND epoch = ?3";
    fence: "SELECT 1 FROM {mailbox} WHERE id = ?1 AND owner = ?2 AND epoch = ?3";

    // Claiming.
    next_due: "SELECT (SELECT min(due_at) FROM {scheduled} WHERE mailbox = ?1), \
        (SELECT min(due_at) FROM {parked} INDEXED BY {parked_due} WHERE mailbox = ?1 AND state = 0), \
        (SELECT EXISTS (SELECT 1 FROM {parked} WHERE mailbox = ?1 AND key IS NOT NULL AND state <> 3)), \
        (SELECT id FROM {event} INDEXED BY {event_mailbox} WHERE mailbox = ?1 ORDER BY id LIMIT 1), \
        (SELECT seq FROM sqlite_sequence WHERE name = {'event'}), max((SELECT coalesce(max(id), 0) FROM {parked}), (SELECT coalesce(max(id), 0) FROM {done}))";
    enter_scheduled: concat!(
        "INSERT INTO {event} (mailbox, ", message_columns!(), ", created_at) ",
        "SELECT mailbox, ", message_columns!(), ", created_at FROM {scheduled} WHERE mailbox = ?1 AND due_at <= ?2 ",
        "ORDER BY due_at, id LIMIT ?3",
    );
    leave_scheduled: "DELETE FROM {scheduled} WHERE id IN \
        (SELECT id FROM {scheduled} WHERE mailbox = ?1 AND due_at <= ?2 ORDER BY due_at, id LIMIT ?3)";
    due_heads: "SELECT id, due_at FROM {parked} INDEXED BY {parked_due} WHERE mailbox = ?1 AND state = 0 ORDER BY due_at, id LIMIT ?2";
    run_of_key: concat!(
        "SELECT id, ", message_columns!(), ", attempts, state FROM {parked} INDEXED BY {parked_key} ",
        "WHERE mailbox = ?1 AND topic = ?2 AND key = ?3 AND state <> 3 AND key IS NOT NULL AND id >= ?4 ORDER BY id LIMIT ?5",
    );
    parked_by_id: concat!("SELECT id, ", message_columns!(), ", attempts, state FROM {parked} WHERE id = ?1");
    /// What is next, packed: the driver hands over row by row between two threads, which costs more than the row. Each
    /// row of the answer is a JSON array of up to 64 events, and their payloads one behind the other.
    fresh: concat!(
        "SELECT ", packed_event!(), " FROM (SELECT id, ", message_columns!(), ", 0 AS is_parked ",
        "FROM {event} INDEXED BY {event_mailbox} WHERE mailbox = ?1 AND id > ?2 AND id <= ?4 ORDER BY id LIMIT ?3) GROUP BY id / 64",
    );
    /// As `fresh`, with whether something of the event's key is parked.
    fresh_and_parked: concat!(
        "SELECT ", packed_event!(), " FROM (SELECT id, ", message_columns!(), ", ",
        "key IS NOT NULL AND EXISTS (SELECT 1 FROM {parked} p INDEXED BY {parked_key} ",
        "WHERE p.mailbox = e.mailbox AND p.topic = e.topic AND p.key = e.key AND p.state <> 3 AND p.key IS NOT NULL) AS is_parked ",
        "FROM {event} e INDEXED BY {event_mailbox} WHERE mailbox = ?1 AND id > ?2 AND id <= ?4 ORDER BY id LIMIT ?3) GROUP BY id / 64",
    );
    /// ?4 how many bytes.
    up_to: "SELECT max(id) FROM (SELECT id, sum(length(payload)) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before \
        FROM (SELECT id, payload FROM {event} INDEXED BY {event_mailbox} WHERE mailbox = ?1 AND id > ?2 ORDER BY id LIMIT ?3)) WHERE coalesce(before, 0) < ?4";
    events_by_id: concat!(
        "SELECT id, ", message_columns!(), " FROM {event} WHERE id IN (SELECT value FROM json_each(?1)) ORDER BY id",
    );
    /// To find those that cannot be read.
    events_after: concat!(
        "SELECT id, ", message_columns!(), " FROM {event} INDEXED BY {event_mailbox} WHERE mailbox = ?1 AND id > ?2 AND id <= ?3 ORDER BY id LIMIT ?4",
    );
    waiting_topics: "SELECT DISTINCT topic FROM {parked} INDEXED BY {parked_topic} WHERE mailbox = ?1 AND state = 2";

    // Settling. Ids come as a JSON array.
    /// At once, and fenced: ?1 mailbox, ?2 ids, ?3 time, ?4 owner, ?5 epoch. It changes nothing if the fence is down,
    /// and gives one row that says whether it stands.
    keep_done: &keep_done("id IN (SELECT value FROM json_each(?2))");
    delete_done: &delete_done("id IN (SELECT value FROM json_each(?2))");
    /// The same for all ids from ?2 to ?6: the common case, without a list.
    keep_done_range: &keep_done("id BETWEEN ?2 AND ?6");
    delete_done_range: &delete_done("id BETWEEN ?2 AND ?6");
    /// In a transaction that has checked the fence.
    keep_events: concat!(
        "INSERT OR REPLACE INTO {done} (id, mailbox, ", message_columns!(), ", created_at, attempts, errors, finished_at) ",
        "SELECT id, mailbox, ", message_columns!(), ", created_at, 0, coalesce(errors, '[]'), ?2 FROM {event} WHERE id IN (SELECT value FROM json_each(?1))",
    );
    park: concat!(
        "INSERT INTO {parked} (id, mailbox, ", message_columns!(), ", created_at, attempts, state, due_at, errors, finished_at) ",
        "SELECT id, mailbox, ", message_columns!(), ", created_at, ?2, ?3, ?4, ?5, ?6 FROM {event} WHERE id = ?1",
    );
    park_behind: concat!(
        "INSERT INTO {parked} (id, mailbox, ", message_columns!(), ", created_at, attempts, state, due_at, errors, finished_at) ",
        "SELECT id, mailbox, ", message_columns!(), ", created_at, 0, 1, NULL, coalesce(errors, '[]'), NULL FROM {event} ",
        "WHERE id IN (SELECT value FROM json_each(?1))",
    );
    delete_ids: "DELETE FROM {event} WHERE id IN (SELECT value FROM json_each(?1))";
    same_key: "SELECT id FROM {event} WHERE id IN (SELECT value FROM json_each(?1)) AND topic = ?2 AND key = ?3 ORDER BY id";
    parked_errors: "SELECT errors FROM {parked} WHERE id = ?1";
    event_errors: "SELECT errors FROM {event} WHERE id = ?1";
    set_parked: "UPDATE {parked} SET attempts = ?2, state = ?3, due_at = ?4, errors = ?5, finished_at = ?6 WHERE id = ?1";
    keep_done_parked: concat!(
        "INSERT OR REPLACE INTO {done} (id, mailbox, ", message_columns!(), ", created_at, attempts, errors, finished_at) ",
        "SELECT id, mailbox, ", message_columns!(), ", created_at, attempts, errors, ?2 FROM {parked} WHERE id = ?1",
    );
    delete_parked: "DELETE FROM {parked} WHERE id = ?1";
    is_behind: "SELECT EXISTS (SELECT 1 FROM {parked} INDEXED BY {parked_key} \
        WHERE mailbox = ?1 AND topic = ?2 AND key = ?3 AND state <> 3 AND key IS NOT NULL AND id < ?4)";
    is_parked_key: "SELECT EXISTS (SELECT 1 FROM {parked} INDEXED BY {parked_key} \
        WHERE mailbox = ?1 AND topic = ?2 AND key = ?3 AND state <> 3 AND key IS NOT NULL)";
    /// The first of a key becomes its head, due at once, if it was behind another.
    promote: concat!("UPDATE {parked} SET state = 0, due_at = ?4 WHERE state = 1 AND id = ", first_of_key!());
    /// Those behind the first of their key are heads no more.
    demote: concat!(
        "UPDATE {parked} INDEXED BY {parked_key} SET state = 1, due_at = NULL ",
        "WHERE mailbox = ?1 AND topic = ?2 AND key = ?3 AND state <> 3 AND key IS NOT NULL AND state IN (0, 2) AND id > ",
        first_of_key!(),
    );
    resume: "UPDATE {parked} SET state = 0, due_at = ?4 WHERE id IN \
        (SELECT id FROM {parked} INDEXED BY {parked_topic} WHERE mailbox = ?1 AND topic = ?2 AND state = 2 ORDER BY id LIMIT ?3)";

    // The inbox, by the name of its mailbox. ?2 is a JSON array of [id, topic, key, whether it is what is parked itself]. Gives for each, in order: 0 new,
    // 1 duplicate, 2 parked, 3 held back.
    admit: "SELECT CASE \
        WHEN EXISTS (SELECT 1 FROM {receipt} WHERE mailbox = m.id AND message_id = unhex(a.value ->> 0)) THEN 1 \
        WHEN NOT a.value ->> 3 AND EXISTS (SELECT 1 FROM {parked} WHERE mailbox = m.id AND message_id = unhex(a.value ->> 0)) THEN 2 \
        WHEN NOT a.value ->> 3 AND EXISTS (SELECT 1 FROM {parked} INDEXED BY {parked_key} WHERE mailbox = m.id AND topic = a.value ->> 1 AND key = a.value ->> 2 \
            AND state <> 3 AND key IS NOT NULL) THEN 3 \
        WHEN row_number() OVER (PARTITION BY a.value ->> 0 ORDER BY a.key) > 1 THEN 1 ELSE 0 END FROM json_each(?2) a LEFT JOIN {mailbox} m ON m.name = ?1 ORDER BY a.key";
    note: "SELECT version, body FROM {note} WHERE mailbox = (SELECT id FROM {mailbox} WHERE name = ?1) AND message_id = ?2";
    add_note: "INSERT INTO {note} (mailbox, message_id, version, body, written_at) SELECT id, ?2, 1, ?3, ?4 FROM {mailbox} WHERE name = ?1 ON CONFLICT DO NOTHING";
    set_note: "UPDATE {note} SET version = version + 1, body = ?3, written_at = ?4 WHERE mailbox = (SELECT id FROM {mailbox} WHERE name = ?1) AND message_id = ?2 AND version = ?5";
    purge_notes: "DELETE FROM {note} WHERE (mailbox, message_id) IN \
        (SELECT mailbox, message_id FROM {note} INDEXED BY {note_written} WHERE mailbox = ?1 AND written_at <= ?2 \
        AND NOT EXISTS (SELECT 1 FROM {parked} p WHERE p.mailbox = ?1 AND p.message_id = {note}.message_id) ORDER BY written_at LIMIT ?3)";
    add_receipts: "INSERT INTO {receipt} (mailbox, message_id, seen_at) SELECT m.id, unhex(value), ?3 FROM json_each(?2) CROSS JOIN {mailbox} m WHERE m.name = ?1";

    // The members of groups: ?1 group. Registering forgets those unseen since ?2 first.
    forget_members: "DELETE FROM {member} WHERE group_name = ?1 AND seen_at < ?2";
    register_member: "INSERT INTO {member} (group_name, owner, types, topics, registered_at, seen_at) VALUES (?1, ?2, ?3, ?4, ?5, ?5) \
        ON CONFLICT (group_name, owner) DO UPDATE SET types = excluded.types, topics = excluded.topics, seen_at = excluded.seen_at";
    members: "SELECT owner, types, topics, registered_at, seen_at FROM {member} WHERE group_name = ?1 AND seen_at >= ?2 ORDER BY registered_at, owner";

    // Cleaning up.
    purge_receipts: "DELETE FROM {receipt} WHERE (mailbox, message_id) IN \
        (SELECT mailbox, message_id FROM {receipt} INDEXED BY {receipt_seen} WHERE mailbox = ?1 AND seen_at <= ?2 ORDER BY seen_at LIMIT ?3)";
    purge_done: "DELETE FROM {done} WHERE id IN \
        (SELECT id FROM {done} INDEXED BY {done_finished} WHERE mailbox = ?1 AND finished_at <= ?2 ORDER BY finished_at LIMIT ?3)";
    old_failed: "SELECT id, topic, key, state FROM {parked} INDEXED BY {parked_failed} \
        WHERE mailbox = ?1 AND state >= 3 AND finished_at <= ?2 ORDER BY finished_at LIMIT ?3";

    // Administration.
    failed: "SELECT id, topic, key, state FROM {parked} INDEXED BY {parked_failed} WHERE mailbox = ?1 AND state >= 3 \
        AND (?2 IS NULL OR topic = ?2) AND (?3 IS NULL OR type = ?3) AND (?4 IS NULL OR key = ?4) \
        AND (?5 IS NULL OR substr(hex(message_id) || '00000000000000000000000000000000', 1, 32) IN (SELECT value FROM json_each(?5))) ORDER BY id LIMIT ?6";
    count_failed: "SELECT count(*) FROM {parked} INDEXED BY {parked_failed} WHERE mailbox = ?1 AND state >= 3 \
        AND (?2 IS NULL OR topic = ?2) AND (?3 IS NULL OR type = ?3) AND (?4 IS NULL OR key = ?4) \
        AND (?5 IS NULL OR substr(hex(message_id) || '00000000000000000000000000000000', 1, 32) IN (SELECT value FROM json_each(?5)))";
    redrive_in_place: "UPDATE {parked} SET state = 0, attempts = 0, due_at = ?2, finished_at = NULL WHERE id = ?1";
    /// As an event again, at the end; what no event may be is passed over.
    requeue: concat!(
        "INSERT OR IGNORE INTO {event} (mailbox, ", message_columns!(), ", created_at, errors) ",
        "SELECT mailbox, ", message_columns!(), ", created_at, errors FROM {parked} WHERE id = ?1",
    );
    redrive_at_the_end: "UPDATE {parked} SET id = ?3, state = 0, attempts = 0, due_at = ?2, finished_at = NULL WHERE id = ?1";
    list: &list();
    mailboxes: "SELECT name FROM {mailbox}";
    stats: "SELECT m.name, \
        (SELECT count(*) FROM {event} WHERE mailbox = m.id), \
        (SELECT count(*) FROM {parked} WHERE mailbox = m.id AND state < 3), \
        (SELECT count(*) FROM {scheduled} WHERE mailbox = m.id), \
        (SELECT count(*) FROM {parked} WHERE mailbox = m.id AND state >= 3), \
        (SELECT count(*) FROM {done} WHERE mailbox = m.id), \
        (SELECT min(created_at) FROM {event} WHERE mailbox = m.id), \
        (SELECT min(created_at) FROM {parked} WHERE mailbox = m.id AND state < 3) \
        FROM {mailbox} m";
}

fn delete_done(which: &str) -> String {
    const FENCE: &str = fence_stands!();
    format!("BEGIN IMMEDIATE; DELETE FROM {{event}} WHERE {which} AND mailbox = ?1 AND {FENCE}; SELECT {FENCE}; COMMIT")
}

fn keep_done(which: &str) -> String {
    const FENCE: &str = fence_stands!();
    const COLUMNS: &str = message_columns!();
    let keep = format!(
        "INSERT OR REPLACE INTO {{done}} (id, mailbox, {COLUMNS}, created_at, attempts, errors, finished_at) \
         SELECT id, mailbox, {COLUMNS}, created_at, 0, coalesce(errors, '[]'), ?3 FROM {{event}} WHERE {which} AND mailbox = ?1 AND {FENCE}"
    );
    delete_done(which).replacen("BEGIN IMMEDIATE; ", &format!("BEGIN IMMEDIATE; {keep}; "), 1)
}

/// Without numbers: to find a numbered parameter SQLite walks a list of them all, for each one bound.
fn insert_events(rows: usize) -> String {
    let columns = concat!(
        "INSERT INTO {event} (mailbox, ",
        message_columns!(),
        ", created_at) VALUES "
    );
    let values = vec!["((SELECT id FROM {mailbox} WHERE name = ?), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"; rows];
    columns.to_owned() + &values.join(", ")
}

/// A page of everything in a mailbox: ?1 mailbox, ?2 part and ?3 id to begin behind, ?4 topic, ?5 type, ?6 key, ?7 ids,
/// ?8 state (0 pending, 1 succeeded, 2 failed), ?9 limit. Part 0 is ordered by the common ids, part 1 is what is
/// scheduled, whose ids are its own.
fn list() -> String {
    let part = |part: u8, table: &str, of: &str, columns: &str, also: &str| {
        format!(
            concat!(
                "SELECT * FROM (SELECT {part} AS part, id, ",
                message_columns!(),
                ", created_at, {columns} FROM {table} ",
                "WHERE mailbox = ?1 AND (?2 < {part} OR (?2 = {part} AND id > ?3)) {also} ",
                "AND (?4 IS NULL OR topic = ?4) AND (?5 IS NULL OR type = ?5) AND (?6 IS NULL OR key = ?6) ",
                "AND (?7 IS NULL OR substr(hex(message_id) || '00000000000000000000000000000000', 1, 32) IN (SELECT value FROM json_each(?7))) ",
                "AND (?8 IS NULL OR ?8 = {of}) ORDER BY id LIMIT ?9)"
            ),
            part = part,
            columns = columns,
            table = table,
            also = also,
            of = of,
        )
    };
    [
        part(0, "{event}", "0", "0, coalesce(errors, '[]'), NULL, NULL, 0", ""),
        part(
            0,
            "{parked}",
            "CASE WHEN state >= 3 THEN 2 ELSE 0 END",
            "attempts, errors, due_at, finished_at, CASE WHEN state >= 3 THEN 2 ELSE 0 END",
            "",
        ),
        part(0, "{done}", "1", "attempts, errors, NULL, finished_at, 1", ""),
        part(1, "{scheduled}", "0", "0, '[]', due_at, NULL, 0", ""),
    ]
    .join(" UNION ALL ")
        + " ORDER BY 1, 2 LIMIT ?9"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_filled_in_and_quoted() {
        let sql = Sql::new(&Names::new("a\"b'c"));
        for statement in [&sql.list, &sql.next_id, &sql.append_64, &sql.promote, &sql.stats] {
            assert!(!statement.as_str().contains('{'), "{}", statement.as_str());
        }
        assert!(sql.next_id.as_str().contains("'a\"b''cevent'"));
        assert!(sql.stats.as_str().contains("\"a\"\"b'cevent\""));
    }
}
