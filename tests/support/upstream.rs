//! A service manager as far as a service sees it: the socket that `NOTIFY_SOCKET` names.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// Collects what it is told. It reads all the time, because a service may block on a full socket.
#[derive(Debug)]
pub(crate) struct Upstream {
    path: PathBuf,
    told: Arc<(Mutex<Vec<String>>, Condvar)>,
}

impl Upstream {
    pub(crate) fn listen(path: &Path) -> Upstream {
        let _ = fs::remove_file(path); // of an earlier master in the same world
        let socket = UnixDatagram::bind(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
        let told = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let shared = Arc::clone(&told);
        thread::spawn(move || {
            let mut bytes = [0; 8192];
            // An empty datagram comes from `drop` only.
            while let Ok(length @ 1..) = socket.recv(&mut bytes) {
                shared.0.lock().unwrap().push(String::from_utf8_lossy(&bytes[..length]).into_owned());
                shared.1.notify_all();
            }
        });
        Upstream { path: path.to_owned(), told }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Everything told so far, one datagram each.
    pub(crate) fn told(&self) -> Vec<String> {
        self.told.0.lock().unwrap().clone()
    }

    /// How many datagrams have come: the place to look from later.
    pub(crate) fn mark(&self) -> usize {
        self.told.0.lock().unwrap().len()
    }

    /// Waits for a datagram with this line among those after `mark`; gives the mark behind it.
    pub(crate) fn wait(&self, mark: usize, line: &str, patience: Duration) -> Option<usize> {
        let found = |told: &Vec<String>| {
            told.iter().skip(mark).position(|datagram| datagram.lines().any(|said| said == line))
        };
        let told = self.told.0.lock().unwrap();
        let (told, _) = self.told.1.wait_timeout_while(told, patience, |told| found(told).is_none()).unwrap();
        found(&told).map(|at| mark + at + 1)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Ok(socket) = UnixDatagram::unbound() {
            let _ = socket.send_to(&[], &self.path);
        }
    }
}
