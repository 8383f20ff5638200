//! Real servers for tests: child processes on free loopback ports, with their data in a temporary directory, which end
//! with the test however it ends. They are waited for by the thread: they are no part of what is tested.
#![allow(clippy::disallowed_methods)]

mod kafka;
mod postgres;
mod proxy;
mod rabbitmq;

pub use kafka::{Kafka, Operation as KafkaOperation, Resource as KafkaResource};
pub use postgres::Postgres;
pub use rabbitmq::RabbitMq;

use std::{
    fs,
    io::{self, Read as _},
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

/// A loopback port that is free now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
    listener.local_addr().expect("its number").port()
}

/// A name that no other test uses.
#[must_use]
pub fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test_{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A server of a test's own, or a running one that the environment names.
#[derive(Debug)]
pub(crate) enum Place<O> {
    Own(Box<O>),
    Given { variable: &'static str, address: String },
}

impl<O> Place<O> {
    /// The running one that this variable names; else one is started.
    pub(crate) fn of(variable: &'static str, start: impl FnOnce() -> O) -> Self {
        match std::env::var(variable) {
            Ok(address) if !address.is_empty() => Self::Given { variable, address },
            _ => Self::Own(Box::new(start())),
        }
    }

    /// The address: of one of our own it is asked.
    pub(crate) fn address(&self, of: impl FnOnce(&O) -> String) -> String {
        match self {
            Self::Own(own) => of(own),
            Self::Given { address, .. } => address.clone(),
        }
    }

    pub(crate) fn own(&self) -> &O {
        match self {
            Self::Own(own) => own,
            Self::Given { variable, .. } => not_ours(variable),
        }
    }

    pub(crate) fn own_mut(&mut self) -> &mut O {
        match self {
            Self::Own(own) => own,
            Self::Given { variable, .. } => not_ours(variable),
        }
    }
}

fn not_ours(variable: &str) -> ! {
    panic!("a server that {variable} names is not this test's, to kill or to configure: it has to start its own")
}

/// Writes a certificate that says who its client is, `client.pem` and `client.key`, and that of its authority, `clients.pem`.
pub(crate) fn client_certificate(dir: &Path, name: &str) {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
    let mut of_authority = CertificateParams::default();
    of_authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    of_authority
        .distinguished_name
        .push(DnType::CommonName, "an authority of clients");
    let key = KeyPair::generate().expect("a key");
    let authority = of_authority.self_signed(&key).expect("a certificate of an authority");
    let issuer = Issuer::new(of_authority, key);
    let mut of_client = CertificateParams::default();
    of_client.distinguished_name = rcgen::DistinguishedName::new();
    of_client.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().expect("a key");
    let client = of_client.signed_by(&key, &issuer).expect("a certificate of a client");
    for (name, text) in [
        ("clients.pem", authority.pem()),
        ("client.pem", client.pem()),
        ("client.key", key.serialize_pem()),
    ] {
        fs::write(dir.join(name), text).expect("a certificate's file");
    }
}

/// Starts the server with its data in `dir`, in a group of its own: a signal to the test's is not one to it. Gives its
/// process id, which stands in the file `pid` there, once it `answers`.
pub(crate) fn launch(server: &mut Command, dir: &Path, answers: impl Fn() -> bool) -> u32 {
    let log = dir.join("server.log");
    let file = || {
        fs::File::options()
            .append(true)
            .create(true)
            .open(&log)
            .expect("the server's log")
    };
    let mut started = server
        .stdin(Stdio::null())
        .stdout(file())
        .stderr(file())
        .process_group(0)
        .spawn()
        .expect("the server starts");
    let pid = started.id();
    fs::write(dir.join("pid"), pid.to_string()).expect("its process id");
    // Whoever waits for it is told when it is gone, so that no dead process is left.
    std::thread::spawn(move || started.wait());
    let has_come = wait_until(Duration::from_secs(90), || answers() || !is_running(pid));
    assert!(
        has_come && is_running(pid),
        "the server does not come up: {server:?}\n{}",
        tail(&log)
    );
    pid
}

/// A directory for a server's data.
pub(crate) fn fresh_dir(what: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("postrider-{what}-{}-{}", std::process::id(), free_port()));
    fs::create_dir(&dir).expect("a directory for the server");
    dir
}

/// Writes a certificate for this machine that signs itself, and its key, into `dir`: `ca.pem`, `key.pem`, and `both.pem`.
pub(crate) fn certificate(dir: &Path) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]);
    let made = made.expect("a certificate");
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    for (name, text) in [
        ("ca.pem", &certificate),
        ("key.pem", &key),
        ("both.pem", &(key.clone() + &certificate)),
    ] {
        fs::write(dir.join(name), text).expect("a certificate's file");
    }
}

/// A shell that ends a server, and removes its data, when this is dropped, or its process ends in whatever way.
#[derive(Debug)]
pub(crate) struct Keeper(Child);

impl Keeper {
    /// For the server with its data in `dir`, whose process id is the first line of the file `pid` there, and which ends on
    /// `signal`.
    pub(crate) fn of(dir: &Path, pid: &str, signal: &str) -> Self {
        let script = r#"
            trap '' INT TERM HUP
            read -r _
            pid=$(head -n 1 "$0/$1" 2>/dev/null) && {
                kill -CONT "$pid"; kill -"$2" "$pid"
                for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
                kill -KILL "$pid"
            } 2>/dev/null
            [ ! -x "$0/ending" ] || "$0/ending" >/dev/null 2>&1
            rm -rf "$0"
        "#;
        let mut keeper = Command::new("sh");
        keeper.arg("-c").arg(script).arg(dir).args([pid, signal]);
        keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(keeper.spawn().expect("a shell"))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The end of its standard input is what it waits for.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Kills processes (SIGKILL), all at one instant.
pub(crate) fn kill(processes: &[u32]) {
    // First none may do anything.
    signal("-STOP", processes);
    signal("-KILL", processes);
    let dead = wait_until(Duration::from_secs(10), || {
        processes.iter().all(|pid| !is_running(*pid))
    });
    assert!(dead, "the server does not die");
}

pub(crate) fn is_running(pid: u32) -> bool {
    // A dead one whose parent has not asked for it yet is no longer running.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

pub(crate) fn is_root() -> bool {
    run(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

/// Runs a command to its end and gives what it printed.
pub(crate) fn run(command: &mut Command) -> io::Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Err(io::Error::other(format!("{command:?}: {} {said}", output.status)))
}

/// Sends a signal to processes. Those that are gone already do not matter.
pub(crate) fn signal(name: &str, pids: &[u32]) {
    let pids = pids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg(name).args(pids).stderr(Stdio::null()).status();
}

/// A process and the children it has.
pub(crate) fn family(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for child in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        // pid (name) state parent …
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        if parent == Some(pid) {
            family.push(child);
        }
    }
    family
}

/// Waits until `is_so`, for at most `limit`.
pub(crate) fn wait_until(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    while !is_so() {
        if began.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// The end of a log file, for a failure's message.
pub(crate) fn tail(path: &Path) -> String {
    let mut text = String::new();
    let _ = fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text));
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
