use super::{Keeper, Place, certificate, free_port, fresh_dir, fresh_name, kill, launch, proxy::Proxy, run, signal};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::Command,
    sync::OnceLock,
    time::Duration,
};

/// An Apache Kafka broker of a test's own: one node, broker and controller in one process. It is stopped, and its data
/// removed, when this is dropped, and when the test's process ends in whatever way.
///
/// Its jars are looked for in `POSTRIDER_TEST_KAFKA_LIB` and where `./test` puts them.
#[derive(Debug)]
pub struct Kafka {
    place: Place<Own>,
}

#[derive(Debug)]
struct Own {
    dir: PathBuf,
    lib: PathBuf,
    port: u16,
    /// Where it speaks TLS.
    tls_port: u16,
    /// Where users log in.
    users_port: u16,
    proxy: Option<Proxy>,
    pid: u32,
    java_options: Vec<String>,
    _keeper: Keeper,
}

const VARIABLE: &str = "POSTRIDER_TEST_KAFKA_BROKERS";

/// Starts fast and needs little; slow once it is warm.
const QUICK: [&str; 4] = [
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xshare:auto",
    "-Xmx512m",
];

impl Kafka {
    /// The broker that all tests of this process share: the one in `POSTRIDER_TEST_KAFKA_BROKERS`, else one of its own.
    #[must_use]
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Kafka> = OnceLock::new();
        SHARED.get_or_init(|| Self {
            place: Place::of(VARIABLE, || Own::start(&QUICK, false)),
        })
    }

    fn own(own: Own) -> Self {
        Self {
            place: Place::Own(Box::new(own)),
        }
    }

    /// Starts a broker for a test that kills or pauses it.
    #[must_use]
    pub fn start() -> Self {
        Self::own(Own::start(&QUICK, false))
    }

    /// Starts a broker whose connections can be [cut](Kafka::cut).
    #[must_use]
    pub fn behind_proxy() -> Self {
        Self::own(Own::start(&QUICK, true))
    }

    /// Starts a broker as a benchmark wants it: it takes longer to start.
    #[must_use]
    pub fn start_fast() -> Self {
        Self::own(Own::start(&["-Xmx2g"], false))
    }

    /// Its address: `host:port`.
    #[must_use]
    pub fn brokers(&self) -> String {
        self.place.address(|own| {
            let port = own.proxy.as_ref().map_or(own.port, Proxy::port);
            format!("127.0.0.1:{port}")
        })
    }

    /// Its address for TLS, and the certificate to trust.
    #[must_use]
    pub fn tls(&self) -> (String, PathBuf) {
        let own = self.place.own();
        (format!("localhost:{}", own.tls_port), own.dir.join("ca.pem"))
    }

    /// Its address for those who log in: the user `app` with the password `app`, told by `PLAIN`, or by a token that nobody has
    /// signed (`OAUTHBEARER`); it has no rights but those that it is [given](Kafka::give).
    #[must_use]
    pub fn for_users(&self) -> String {
        format!("127.0.0.1:{}", self.place.own().users_port)
    }

    /// Gives the user `app` a right to a `topic` or a `group`.
    pub fn give(&self, operation: Operation, resource: Resource, name: &str) {
        self.acl(CREATE_ACLS, operation, resource, name);
    }

    /// Takes it away again.
    pub fn withdraw(&self, operation: Operation, resource: Resource, name: &str) {
        self.acl(DELETE_ACLS, operation, resource, name);
    }

    /// Neither the client nor the jars that a broker needs can do that: it is said in Kafka's protocol.
    fn acl(&self, api: u8, operation: Operation, resource: Resource, name: &str) {
        let string = |text: &str| {
            [
                &u16::try_from(text.len()).expect("a short name").to_be_bytes()[..],
                text.as_bytes(),
            ]
            .concat()
        };
        let (literal, allow) = (3, 3);
        let body = [
            // Version 1, correlation 7, client "t", one entry.
            &[0, api, 0, 1, 0, 0, 0, 7, 0, 1, b't', 0, 0, 0, 1, resource as u8][..],
            &string(name),
            &[literal],
            &string("User:app"),
            &string("*"),
            &[operation as u8, allow],
        ]
        .concat();
        let own = self.place.own();
        let mut socket = TcpStream::connect(("127.0.0.1", own.port)).expect("Kafka");
        let size = u32::try_from(body.len()).expect("a short request").to_be_bytes();
        socket
            .write_all(&[&size[..], &body].concat())
            .expect("Kafka takes the request");
        // Length, correlation, throttle, count, and the error of the first.
        let mut answer = [0; 18];
        socket.read_exact(&mut answer).expect("Kafka answers");
        assert_eq!(answer[16..], [0, 0], "Kafka does not change a right");
    }

    /// A name for topics and groups that no other test uses.
    #[must_use]
    pub fn fresh_name(&self) -> String {
        fresh_name()
    }

    /// Kills it (SIGKILL), as a power failure would.
    pub fn kill(&mut self) {
        kill(&[self.place.own_mut().pid]);
    }

    /// Stops it (SIGSTOP) until [`resume`](Kafka::resume).
    pub fn pause(&mut self) {
        signal("-STOP", &[self.place.own_mut().pid]);
    }

    /// Lets it go on.
    pub fn resume(&mut self) {
        signal("-CONT", &[self.place.own_mut().pid]);
    }

    /// Starts it again, after [`kill`](Kafka::kill), on the same data and the same port.
    pub fn restart(&mut self) {
        self.place.own_mut().run();
    }

    /// Cuts all connections that there are to it.
    ///
    /// # Panics
    /// If it was not started [behind a proxy](Kafka::behind_proxy).
    pub fn cut(&mut self) {
        self.place.own().proxy.as_ref().expect("a proxy").cut();
    }
}

/// What a right is about.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Resource {
    Topic = 2,
    Group = 3,
}

/// What a right permits.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Operation {
    Read = 3,
    Write = 4,
    Create = 5,
    Describe = 8,
}

const CREATE_ACLS: u8 = 30;
const DELETE_ACLS: u8 = 31;

impl Own {
    fn start(java_options: &[&str], behind_proxy: bool) -> Self {
        let dir = fresh_dir("kafka");
        let (port, tls_port, controller) = (free_port(), free_port(), free_port());
        let users_port = free_port();
        let proxy = behind_proxy.then(|| Proxy::to(port));
        let advertised = proxy.as_ref().map_or(port, Proxy::port);
        certificate(&dir);
        let properties = PROPERTIES
            .replace("{port}", &port.to_string())
            .replace("{advertised}", &advertised.to_string())
            .replace("{tls}", &tls_port.to_string())
            .replace("{users}", &users_port.to_string())
            .replace("{dir}", &dir.display().to_string())
            .replace("{controller}", &controller.to_string());
        fs::write(dir.join("server.properties"), properties).expect("its configuration");
        fs::write(dir.join("log4j2.yaml"), LOGGING).expect("its configuration");
        let mut own = Own {
            _keeper: Keeper::of(&dir, "pid", "TERM"),
            dir,
            lib: lib(),
            port,
            tls_port,
            users_port,
            proxy,
            pid: 0,
            java_options: java_options.iter().map(|option| (*option).to_owned()).collect(),
        };
        let mut format = own.java(&QUICK);
        format.args([
            "kafka.tools.StorageTool",
            "format",
            "--standalone",
            "-t",
            "cG9zdHJpZGVyLXRlc3RzIQ",
            "-c",
        ]);
        run(format.arg(own.dir.join("server.properties"))).expect("Kafka's storage is formatted");
        own.run();
        own
    }

    fn java(&self, options: &[&str]) -> Command {
        let mut java = Command::new("java");
        java.arg("-cp").arg(self.lib.join("*")).args(options);
        java.arg(format!(
            "-Dlog4j2.configurationFile={}",
            self.dir.join("log4j2.yaml").display()
        ));
        java
    }

    fn run(&mut self) {
        let options: Vec<&str> = self.java_options.iter().map(String::as_str).collect();
        let mut server = self.java(&options);
        server.arg("kafka.Kafka").arg(self.dir.join("server.properties"));
        let port = self.port;
        self.pid = launch(&mut server, &self.dir, || has_metadata(port));
    }
}

/// Whether it answers a request for metadata that names a broker: a port may be open long before, or still.
fn has_metadata(port: u16) -> bool {
    let Ok(mut socket) = TcpStream::connect(("127.0.0.1", port)) else {
        return false;
    };
    let _ = socket.set_read_timeout(Some(Duration::from_secs(2)));
    // Length, metadata request (3) of version 1, correlation 7, client "t", no topics.
    let request = [0, 0, 0, 15, 0, 3, 0, 1, 0, 0, 0, 7, 0, 1, b't', 0, 0, 0, 0];
    let mut head = [0; 12];
    socket.write_all(&request).is_ok()
        && socket.read_exact(&mut head).is_ok()
        && head[4..8] == [0, 0, 0, 7]
        && head[8..12] != [0, 0, 0, 0]
}

fn lib() -> PathBuf {
    if let Ok(lib) = std::env::var("POSTRIDER_TEST_KAFKA_LIB") {
        return lib.into();
    }
    let lib = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/kafka/lib"));
    assert!(
        fs::read_dir(&lib).is_ok_and(|mut files| files.next().is_some()),
        "Apache Kafka is not there (./test fetches it into target/kafka/lib); {VARIABLE} names a running one, POSTRIDER_TEST_KAFKA_LIB the folder of its jars"
    );
    lib
}

const PROPERTIES: &str = "\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},SSL://127.0.0.1:{tls},SASL_PLAINTEXT://127.0.0.1:{users},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{advertised},SSL://localhost:{tls},SASL_PLAINTEXT://127.0.0.1:{users},CONTROLLER://127.0.0.1:{controller}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN,OAUTHBEARER
listener.name.sasl_plaintext.oauthbearer.sasl.jaas.config=org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub=\"broker\";
listener.name.sasl_plaintext.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_app=\"app\";
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
ssl.keystore.type=PEM
ssl.keystore.location={dir}/both.pem
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={dir}/logs
num.partitions=4
log.retention.check.interval.ms=500
log.initial.task.delay.ms=500
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.consumer.heartbeat.interval.ms=500
group.consumer.min.heartbeat.interval.ms=500
group.consumer.assignment.interval.ms=0
group.consumer.session.timeout.ms=6000
group.consumer.min.session.timeout.ms=6000
";

const LOGGING: &str = "\
Configuration:
  Appenders:
    Console: { name: STDOUT, PatternLayout: { pattern: \"%d %p %c{1} %m%n\" } }
  Loggers:
    Root: { level: WARN, AppenderRef: [ { ref: STDOUT } ] }
";
