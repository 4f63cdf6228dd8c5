//! Clients of a unix socket, each of which counts what became of its connections.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use super::PATIENCE;

/// What became of all connections so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fates {
    /// Answers by the generation that gave them.
    pub(crate) answers: BTreeMap<u32, u64>,
    /// Why others were lost.
    pub(crate) lost: Vec<String>,
}

/// What the clients write down, and a bell for who waits for it.
type Book = (Mutex<Fates>, Condvar);

/// Clients that connect one time after the other until they are told to stop.
#[derive(Debug)]
pub(crate) struct UnixLoad {
    clients: Vec<JoinHandle<()>>,
    fates: Arc<Book>,
    stop: Arc<AtomicBool>,
}

/// One connection: what is answered to this.
pub(crate) fn ask(path: &Path, request: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The generation an answer names.
pub(crate) fn generation_in(answer: &str) -> Option<u32> {
    let (_, rest) = answer.split_once("generation=")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

impl UnixLoad {
    /// So many clients of this socket with this request, begun and answered.
    pub(crate) fn start(path: PathBuf, request: &'static str, clients: usize) -> UnixLoad {
        let (fates, stop) = (Arc::<Book>::default(), Arc::new(AtomicBool::new(false)));
        let client = |_| {
            let (path, fates, stop) = (path.clone(), Arc::clone(&fates), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let answer = ask(&path, request);
                    let mut book = fates.0.lock().unwrap();
                    match answer.map(|answer| generation_in(&answer).ok_or(answer)) {
                        Ok(Ok(generation)) => *book.answers.entry(generation).or_default() += 1,
                        Ok(Err(answer)) => book.lost.push(format!("no answer: {answer:?}")),
                        Err(error) => book.lost.push(error.to_string()),
                    }
                    fates.1.notify_all();
                }
            })
        };
        let load = UnixLoad { clients: (0..clients).map(client).collect(), fates, stop };
        load.wait("the first answers", |fates| fates.answers.values().sum::<u64>() > 20);
        load
    }

    /// Waits until what became of the connections is as wanted.
    pub(crate) fn wait(&self, what: &str, wanted: impl Fn(&Fates) -> bool) {
        let (book, bell) = &*self.fates;
        let waited = bell.wait_timeout_while(book.lock().unwrap(), PATIENCE, |fates| !wanted(fates));
        let (fates, timeout) = waited.unwrap();
        assert!(!timeout.timed_out(), "never {what}: {fates:?}");
    }

    /// Waits for answers of this generation.
    pub(crate) fn answered_by(&self, generation: u32) {
        self.wait("the generation", |fates| fates.answers.get(&generation).is_some_and(|count| *count > 20));
    }

    /// Waits for answers to connections made from now on.
    pub(crate) fn fresh_answers(&self) {
        let count = |fates: &Fates| fates.answers.values().sum::<u64>();
        let before = count(&self.fates_so_far());
        // Each client may have one under way.
        let under_way = self.clients.len() as u64;
        self.wait("answers", |fates| count(fates) > before + under_way + 20);
    }

    pub(crate) fn fates_so_far(&self) -> Fates {
        self.fates.0.lock().unwrap().clone()
    }

    pub(crate) fn end(mut self) -> Fates {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.drain(..).for_each(|client| client.join().unwrap());
        self.fates_so_far()
    }

    /// The same, and nothing may have been lost.
    pub(crate) fn end_lossless(self) -> Fates {
        let fates = self.end();
        assert!(fates.lost.is_empty(), "{fates:?}");
        fates
    }
}
