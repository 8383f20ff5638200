use std::{
    io,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// A port in front of a server's own, whose connections can be cut while the server runs on.
#[derive(Debug)]
pub(crate) struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Both ends of each connection.
    open: Mutex<Vec<[TcpStream; 2]>>,
    has_ended: AtomicBool,
}

impl Proxy {
    /// In front of this port.
    pub(crate) fn to(server: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port");
        let port = listener.local_addr().expect("its number").port();
        let shared = Arc::new(Shared {
            open: Mutex::default(),
            has_ended: AtomicBool::new(false),
        });
        let proxy = shared.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if proxy.has_ended.load(Ordering::Acquire) {
                    break;
                }
                // Where there is no server, the client's connection ends here.
                let _ = proxy.carry(client, server);
            }
        });
        Self { port, shared }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Cuts every connection there is; new ones are carried as before.
    pub(crate) fn cut(&self) {
        for ends in self.shared.open().drain(..) {
            close(&ends);
        }
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Vec<[TcpStream; 2]>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self, client: TcpStream, server: u16) -> io::Result<()> {
        let server = TcpStream::connect((Ipv4Addr::LOCALHOST, server))?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        for (from, to) in [(&client, &server), (&server, &client)] {
            let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
            thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                close(&[from, to]);
            });
        }
        self.open().push([client, server]);
        Ok(())
    }
}

fn close(ends: &[TcpStream; 2]) {
    for end in ends {
        let _ = end.shutdown(Shutdown::Both);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::Release);
        // It wakes whoever waits for the next one.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        self.cut();
    }
}
