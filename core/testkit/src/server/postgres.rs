use super::{
    Keeper, Place, family, free_port, fresh_dir, fresh_name, is_root, is_running, kill, run, signal, tail, wait_until,
};
use std::{
    fs,
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

/// A Postgres server of a test's own. It is stopped, and its data removed, when this is dropped, and when the test's
/// process ends in whatever way.
///
/// Its programs are looked for in `POSTRIDER_TEST_POSTGRES_BIN`, in Debian's place for them, and in the path. It refuses to run as
/// root; then it runs as the user `postgres`, or `nobody`.
#[derive(Debug)]
pub struct Postgres {
    place: Place<Own>,
}

#[derive(Debug)]
struct Own {
    dir: PathBuf,
    bin: PathBuf,
    user: Option<&'static str>,
    port: u16,
    settings: Vec<String>,
    _keeper: Keeper,
}

const WITHOUT_FSYNC: [&str; 1] = ["fsync=off"];

const VARIABLE: &str = "POSTRIDER_TEST_POSTGRES_URL";

impl Postgres {
    /// The server that all tests of this process share: the one in `POSTRIDER_TEST_POSTGRES_URL`, else one of its own.
    /// Made for many short tests: without `fsync`.
    #[must_use]
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(|| Self {
            place: Place::of(VARIABLE, || Own::start(&WITHOUT_FSYNC)),
        })
    }

    /// Starts a server for a test that kills or pauses it.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&WITHOUT_FSYNC)
    }

    /// Starts a server with these settings beside the usual ones.
    #[must_use]
    pub fn start_with(settings: &[&str]) -> Self {
        Self {
            place: Place::Own(Box::new(Own::start(settings))),
        }
    }

    /// The address of its database `postgres`.
    #[must_use]
    pub fn url(&self) -> String {
        self.place
            .address(|own| format!("postgres://postgres@127.0.0.1:{}/postgres", own.port))
    }

    /// A name for a schema that no other test uses.
    #[must_use]
    pub fn fresh_name(&self) -> String {
        fresh_name()
    }

    /// The folder of its programs, `psql` among them.
    #[must_use]
    pub fn programs() -> PathBuf {
        binaries()
    }

    /// Kills it and all its processes at once (SIGKILL), as a power failure would.
    pub fn kill(&mut self) {
        let own = self.place.own_mut();
        kill(&own.processes());
    }

    /// Stops all its processes (SIGSTOP) until [`resume`](Postgres::resume).
    pub fn pause(&mut self) {
        let processes = self.place.own_mut().processes();
        signal("-STOP", &processes);
    }

    /// Lets them go on.
    pub fn resume(&mut self) {
        let processes = self.place.own_mut().processes();
        signal("-CONT", &processes);
    }

    /// Starts it again, after [`kill`](Postgres::kill), on the same data and the same port.
    pub fn restart(&mut self) {
        self.place.own_mut().run();
    }

    /// Ends it in order, connections cut.
    pub fn stop(&mut self) {
        let own = self.place.own_mut();
        let pid = own.pid();
        signal("-INT", &[pid]);
        assert!(
            wait_until(Duration::from_secs(20), || !is_running(pid)),
            "the server does not stop"
        );
    }
}

impl Own {
    fn start(settings: &[&str]) -> Self {
        let bin = binaries();
        let user = is_root().then(unprivileged_user);
        let dir = fresh_dir("postgres");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("its permissions");
        let (data, log) = (dir.join("data"), dir.join("server.log"));
        fs::create_dir(&data).expect("a directory for the data");
        fs::write(&log, "").expect("a log file");
        if let Some(user) = user {
            run(Command::new("chown").arg(user).args([&data, &log]))
                .expect("the directory is given to the server's user");
        }
        let mut initdb = as_user(user, &bin.join("initdb"));
        initdb.args([
            "--auth=trust",
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "-D",
        ]);
        run(initdb.arg(&data)).expect("initdb");
        let mut own = Own {
            _keeper: Keeper::of(&dir, "data/postmaster.pid", "QUIT"),
            dir,
            bin,
            user,
            port: free_port(),
            settings: settings.iter().map(|s| (*s).to_owned()).collect(),
        };
        own.run();
        own
    }

    fn run(&mut self) {
        let (data, log) = (self.dir.join("data"), self.dir.join("server.log"));
        let mut server = as_user(self.user, &self.bin.join("postgres"));
        server.arg("-D").arg(&data).args(["-p", &self.port.to_string()]);
        let usual = [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "max_connections=300",
            "shared_buffers=256MB",
            "max_prepared_transactions=10",
            "log_min_messages=warning",
        ];
        for setting in usual.iter().copied().chain(self.settings.iter().map(String::as_str)) {
            server.args(["-c", setting]);
        }
        let file = fs::File::options().append(true).open(&log).expect("the server's log");
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let mut started = server.spawn().expect("the server starts");
        // Whoever waits for it is told when it is gone, so that no dead process is left.
        std::thread::spawn(move || started.wait());
        let port = self.port;
        let answers = wait_until(Duration::from_secs(60), || {
            let ready = fs::read_to_string(data.join("postmaster.pid")).is_ok_and(|pid| pid.contains("ready"));
            ready && TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        assert!(answers, "the Postgres server does not come up:\n{}", tail(&log));
    }

    fn pid(&self) -> u32 {
        let file = fs::read_to_string(self.dir.join("data/postmaster.pid")).expect("the server runs");
        file.lines()
            .next()
            .and_then(|line| line.parse().ok())
            .expect("its process id")
    }

    fn processes(&self) -> Vec<u32> {
        family(self.pid())
    }
}

fn as_user(user: Option<&str>, program: &Path) -> Command {
    let Some(user) = user else {
        return Command::new(program);
    };
    let mut command = Command::new("setpriv");
    command.args([
        &format!("--reuid={user}"),
        &format!("--regid={}", group_of(user)),
        "--clear-groups",
        "--",
    ]);
    command.arg(program).current_dir("/");
    command
}

fn group_of(user: &str) -> String {
    let group = run(Command::new("id").args(["-g", user])).expect("the group of the server's user");
    group.trim().to_owned()
}

fn unprivileged_user() -> &'static str {
    let exists = |user: &&str| run(Command::new("id").args(["-u", user])).is_ok();
    ["postgres", "nobody"]
        .into_iter()
        .find(exists)
        .expect("a user that is not root, to run Postgres as")
}

fn binaries() -> PathBuf {
    if let Ok(bin) = std::env::var("POSTRIDER_TEST_POSTGRES_BIN") {
        return bin.into();
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions
        .map(|entry| entry.path().join("bin"))
        .filter(|bin| bin.join("initdb").exists())
        .collect();
    found.sort();
    let in_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).find(|dir| dir.join("initdb").exists())
    };
    found.pop().or_else(in_path).expect(
        "Postgres is not installed (apt-get install postgresql-15, or run ./test); POSTRIDER_TEST_POSTGRES_URL names a running one, POSTRIDER_TEST_POSTGRES_BIN the folder of its programs",
    )
}
