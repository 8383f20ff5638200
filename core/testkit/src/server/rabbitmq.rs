use super::{
    Keeper, Place, certificate, client_certificate, family, free_port, fresh_dir, fresh_name, kill, launch,
    proxy::Proxy, run, signal,
};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

/// A RabbitMQ broker of a test's own. It is stopped, and its data removed, when this is dropped, and when the test's process
/// ends in whatever way.
///
/// Its programs are looked for in `POSTRIDER_TEST_RABBITMQ_BIN` and in Debian's place for them. Where `../../../bin` beside them
/// has an Erlang, they run on that one.
#[derive(Debug)]
pub struct RabbitMq {
    place: Place<Own>,
}

#[derive(Debug)]
struct Own {
    dir: PathBuf,
    bin: PathBuf,
    port: u16,
    /// Where it speaks TLS.
    tls_port: u16,
    proxy: Option<Proxy>,
    /// Of the node's own protocol, and of the daemon that knows its port.
    dist: u16,
    epmd: u16,
    pid: u32,
    _keeper: Keeper,
}

/// A roll-over of the whole log, of 512 MB as it comes, stops a slow disk for ten seconds and more.
const CONFIG: &str = "\
vm_memory_high_watermark.absolute = 2GB
disk_free_limit.absolute = 50MB
raft.wal_max_size_bytes = 64000000
loopback_users = none
listeners.ssl.default = 127.0.0.1:{tls}
ssl_options.cacertfile = {dir}/clients.pem
ssl_options.certfile = {dir}/ca.pem
ssl_options.keyfile = {dir}/key.pem
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = false
ssl_cert_login_from = common_name
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = EXTERNAL
";

const VARIABLE: &str = "POSTRIDER_TEST_RABBITMQ_URL";

impl RabbitMq {
    /// The broker that all tests of this process share: the one in `POSTRIDER_TEST_RABBITMQ_URL`, else one of its own.
    #[must_use]
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<RabbitMq> = OnceLock::new();
        SHARED.get_or_init(|| Self {
            place: Place::of(VARIABLE, || Own::start(false)),
        })
    }

    /// Starts a broker for a test that kills or pauses it.
    #[must_use]
    pub fn start() -> Self {
        Self {
            place: Place::Own(Box::new(Own::start(false))),
        }
    }

    /// Starts a broker whose connections can be [cut](RabbitMq::cut).
    #[must_use]
    pub fn behind_proxy() -> Self {
        Self {
            place: Place::Own(Box::new(Own::start(true))),
        }
    }

    /// The address of its virtual host `/`.
    #[must_use]
    pub fn url(&self) -> String {
        self.place.address(|own| {
            let port = own.proxy.as_ref().map_or(own.port, Proxy::port);
            format!("amqp://guest:guest@127.0.0.1:{port}/%2f")
        })
    }

    /// Its address for TLS, and the certificate to trust.
    #[must_use]
    pub fn tls(&self) -> (String, PathBuf) {
        let own = self.place.own();
        let url = format!("amqps://guest:guest@localhost:{}/%2f", own.tls_port);
        (url, own.dir.join("ca.pem"))
    }

    /// A certificate, and its key, of a client whose name is `app`.
    #[must_use]
    pub fn client_certificate(&self) -> (PathBuf, PathBuf) {
        let dir = &self.place.own().dir;
        (dir.join("client.pem"), dir.join("client.key"))
    }

    /// A name for exchanges, groups and topics that no other test uses.
    #[must_use]
    pub fn fresh_name(&self) -> String {
        fresh_name()
    }

    /// Kills it and all its processes at once (SIGKILL), as a power failure would.
    pub fn kill(&mut self) {
        kill(&family(self.place.own_mut().pid));
    }

    /// Stops all its processes (SIGSTOP) until [`resume`](RabbitMq::resume).
    pub fn pause(&mut self) {
        signal("-STOP", &family(self.place.own_mut().pid));
    }

    /// Lets them go on.
    pub fn resume(&mut self) {
        signal("-CONT", &family(self.place.own_mut().pid));
    }

    /// Starts it again, after [`kill`](RabbitMq::kill), on the same data and the same port.
    pub fn restart(&mut self) {
        self.place.own_mut().run();
    }

    /// Cuts all connections that there are to it.
    ///
    /// # Panics
    /// If it was not started [behind a proxy](RabbitMq::behind_proxy).
    pub fn cut(&mut self) {
        self.place.own().proxy.as_ref().expect("a proxy").cut();
    }

    /// Runs `rabbitmqctl` on it, which takes a second or two, and gives what it printed.
    pub fn ctl(&mut self, arguments: &[&str]) -> String {
        let own = self.place.own_mut();
        let mut ctl = own.command("rabbitmqctl");
        ctl.arg("-q").args(arguments);
        run(&mut ctl).expect("rabbitmqctl")
    }
}

impl Own {
    fn start(behind_proxy: bool) -> Self {
        let dir = fresh_dir("rabbitmq");
        let bin = programs();
        let (dist, epmd) = (free_port(), free_port());
        let (port, tls_port) = (free_port(), free_port());
        certificate(&dir);
        client_certificate(&dir, "app");
        let config = CONFIG
            .replace("{tls}", &tls_port.to_string())
            .replace("{dir}", &dir.display().to_string());
        fs::write(dir.join("rabbitmq.conf"), config).expect("its configuration");
        fs::write(dir.join("enabled_plugins"), "[rabbitmq_auth_mechanism_ssl].").expect("its plugins");
        // The port daemon outlives the node.
        let ending = dir.join("ending");
        let path = search_path(&bin);
        let script = format!("#!/bin/sh\nPATH='{}' epmd -port {epmd} -kill\n", path.display());
        fs::write(&ending, script).expect("a script");
        fs::set_permissions(&ending, fs::Permissions::from_mode(0o755)).expect("its permissions");
        let mut own = Own {
            bin,
            port,
            tls_port,
            proxy: behind_proxy.then(|| Proxy::to(port)),
            dist,
            epmd,
            pid: 0,
            _keeper: Keeper::of(&dir, "pid", "TERM"),
            dir,
        };
        own.run();
        own
    }

    /// One of its programs, in its surroundings.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        let dir = |name: &str| self.dir.join(name);
        command
            .env("PATH", search_path(&self.bin))
            .env("HOME", &self.dir)
            .env("RABBITMQ_NODENAME", format!("postrider{}@localhost", self.port))
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.dist.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("ERL_EPMD_PORT", self.epmd.to_string())
            .env("RABBITMQ_MNESIA_BASE", dir("data"))
            .env("RABBITMQ_LOG_BASE", dir("log"))
            .env("RABBITMQ_LOGS", "-")
            .env("RABBITMQ_CONFIG_FILE", dir("rabbitmq"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", dir("enabled_plugins"))
            .env("RABBITMQ_CONF_ENV_FILE", dir("none"))
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1}",
            );
        command
    }

    fn run(&mut self) {
        let (port, tls_port) = (self.port, self.tls_port);
        let answers = || speaks_amqp(port) && TcpStream::connect(("127.0.0.1", tls_port)).is_ok();
        self.pid = launch(&mut self.command("rabbitmq-server"), &self.dir, answers);
    }
}

/// Whether it answers a greeting.
fn speaks_amqp(port: u16) -> bool {
    let Ok(mut socket) = TcpStream::connect(("127.0.0.1", port)) else {
        return false;
    };
    let _ = socket.set_read_timeout(Some(Duration::from_secs(2)));
    let mut answer = [0; 1];
    socket.write_all(b"AMQP\x00\x00\x09\x01").is_ok() && socket.read_exact(&mut answer).is_ok() && answer[0] == 1
}

/// Where its programs find Erlang: beside them, where it is unpacked with one of its own.
fn search_path(bin: &Path) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(bin.join("../../../bin")).chain(std::env::split_paths(&path));
    std::env::join_paths(path).expect("a path").into()
}

fn programs() -> PathBuf {
    if let Ok(bin) = std::env::var("POSTRIDER_TEST_RABBITMQ_BIN") {
        return bin.into();
    }
    let debian = PathBuf::from("/usr/lib/rabbitmq/bin");
    assert!(
        debian.join("rabbitmq-server").exists(),
        "RabbitMQ is not installed (apt-get install rabbitmq-server, or run ./test); {VARIABLE} names a running one, POSTRIDER_TEST_RABBITMQ_BIN the folder of its programs"
    );
    debian
}
