//! A wire that breaks: a relay in front of a workspace that passes so many bytes of its answers on, and then ends the
//! connection or falls silent. Knows nothing of what it relays, so it cuts TLS records as well.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// What happens behind the last byte that passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    Close,
    Reset,
    Stall,
}

struct Shared {
    target: SocketAddr,
    passes: AtomicUsize,
    how: Mutex<Break>,
    stop: AtomicBool,
    sockets: Mutex<Vec<Weak<TcpStream>>>,
}

/// The relay; gone when dropped.
pub struct Cutter {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Cutter {
    pub fn before(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared {
            target,
            passes: AtomicUsize::new(usize::MAX),
            how: Mutex::new(Break::Close),
            stop: AtomicBool::new(false),
            sockets: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if accepting.stop.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || relay(&shared, client));
            }
        });
        Self { address, shared }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on each new connection brings so many bytes, and then this.
    pub fn set(&self, passes: usize, how: Break) {
        *self.shared.how.lock().expect("no holder panics") = how;
        self.shared.passes.store(passes, Ordering::SeqCst);
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let sockets = std::mem::take(&mut *self.shared.sockets.lock().expect("no holder panics"));
        for socket in sockets.iter().filter_map(Weak::upgrade) {
            // One that is closed already has nothing left to stop.
            socket.shutdown(Shutdown::Both).ok();
        }
        TcpStream::connect(self.address).ok();
    }
}

fn relay(shared: &Shared, client: TcpStream) -> Option<()> {
    let how = *shared.how.lock().expect("no holder panics");
    let mut left = shared.passes.load(Ordering::SeqCst);
    let (client, target) = (Arc::new(client), Arc::new(TcpStream::connect(shared.target).ok()?));
    for socket in [&client, &target] {
        socket.set_nodelay(true).ok();
        shared.sockets.lock().expect("no holder panics").push(Arc::downgrade(socket));
    }
    let (up_from, up_to) = (Arc::clone(&client), Arc::clone(&target));
    let upwards = std::thread::spawn(move || {
        std::io::copy(&mut &*up_from, &mut &*up_to).ok();
        up_to.shutdown(Shutdown::Both).ok();
    });
    let mut piece = [0; 16 * 1024];
    while left > 0 {
        let most = left.min(piece.len());
        let count = (&*target).read(&mut piece[..most]).ok().filter(|&count| count > 0);
        let Some(count) = count else { break };
        (&*client).write_all(&piece[..count]).ok()?;
        left -= count;
    }
    match how {
        // Until the other side gives up, which ends the copying above.
        Break::Stall if left == 0 => {}
        Break::Reset if left == 0 => {
            // No other handle may be left: only the last one that is closed resets.
            client.shutdown(Shutdown::Read).ok();
            target.shutdown(Shutdown::Both).ok();
            upwards.join().ok();
            socket2::SockRef::from(&*client).set_linger(Some(Duration::ZERO)).ok();
        }
        _ => {
            client.shutdown(Shutdown::Both).ok();
            target.shutdown(Shutdown::Both).ok();
        }
    }
    Some(())
}
