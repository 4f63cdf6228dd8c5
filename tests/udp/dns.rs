//! A DNS server as it is installed, under the very config in `examples/servers`.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use reuseportd_wire::status::Outcome;

use crate::real_servers::{app, copy};
use crate::support::PATIENCE;
use crate::support::load::alone;
use crate::support::master::Master;
use crate::support::world::{Need, World, world};

const NEEDS: [Need; 3] = [Need::Root, Need::Bpf, Need::Runs("unbound", &["-V"])];
const CLIENTS: usize = 8;
/// Questions that a client has open all the time: so the server's queues are hardly ever empty, and never overflow.
const OPEN: usize = 16;
/// One that is not answered for so long is lost.
const GIVEN_UP: Duration = Duration::from_secs(2);
/// After its number: recursion desired, one question: who.test, A, IN.
const QUESTION: &[u8] = b"\x01\0\0\x01\0\0\0\0\0\0\x03who\x04test\0\0\x01\0\x01";

/// What became of the questions.
#[derive(Debug, Default)]
struct Asked {
    is_over: AtomicBool,
    answered: AtomicU64,
    lost: AtomicU64,
}

impl Asked {
    /// Asks until it is over, and waits for the last answers.
    fn ask(&self, address: SocketAddr) {
        let socket = UdpSocket::bind((address.ip(), 0)).unwrap();
        socket.connect(address).unwrap();
        socket.set_read_timeout(Some(GIVEN_UP)).unwrap();
        let (mut number, mut open) = (0_u16, BTreeSet::new());
        loop {
            while open.len() < OPEN && !self.is_over.load(Ordering::Relaxed) {
                number = number.wrapping_add(1);
                // One that was lost long ago has it still.
                if open.insert(number) {
                    socket.send(&[&number.to_be_bytes(), QUESTION].concat()).unwrap();
                }
            }
            if open.is_empty() {
                return;
            }
            let mut answer = [0; 512];
            match socket.recv(&mut answer) {
                Ok(length) => {
                    // No error, and one answer.
                    assert!(length > QUESTION.len() && answer[3] & 0xf == 0 && answer[7] == 1, "{answer:?}");
                    assert!(open.remove(&u16::from_be_bytes([answer[0], answer[1]])), "twice: {answer:?}");
                    self.answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
                    self.lost.fetch_add(open.len() as u64, Ordering::Relaxed);
                    open.clear();
                }
            }
        }
    }

    fn wait_answered(&self, more: u64) {
        let goal = self.answered.load(Ordering::Relaxed) + more;
        let deadline = Instant::now() + PATIENCE;
        while self.answered.load(Ordering::Relaxed) < goal {
            assert!(Instant::now() < deadline, "no more answers: {self:?}");
            thread::yield_now();
        }
    }
}

/// Questions all the while: so many are answered, and so many lost.
fn asked_while(world: &World, what: impl FnOnce(&Asked)) -> (u64, u64) {
    let _alone = alone();
    let asked = Asked::default();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| asked.ask(world.address));
        }
        let end = End(&asked.is_over);
        asked.wait_answered(100);
        what(&asked);
        drop(end);
    });
    (asked.answered.into_inner(), asked.lost.into_inner())
}

/// However the test ends, so does the asking.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn unbound() {
    world(&NEEDS, |world| {
        let directory = copy(world);
        for engine in ["ebpf", "cbpf"] {
            let master = Master::start(world, &app(world, &directory, "unbound", engine));
            let (answered, lost) = asked_while(world, |asked| {
                for generation in 2..=4 {
                    assert_eq!(master.upgrade().to, Some(generation));
                    asked.wait_answered(2000);
                }
                let conf = directory.join("unbound.conf");
                let text = fs::read_to_string(&conf).unwrap();
                fs::write(&conf, text.replace("do-tcp: no", "do-tcp: perhaps")).unwrap();
                let (code, receipt) = master.failing_upgrade();
                assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
                fs::write(&conf, text).unwrap();
                asked.wait_answered(1000);
            });
            eprintln!("unbound {engine}: {answered} answered, {lost} lost");
            assert_eq!(lost, 0);
            master.stop();
        }
        let control = app(world, &directory, "unbound", "none");
        let master = Master::start(world, &control);
        let (_, lost) = asked_while(world, |asked| {
            // It reads many at a time: mostly, but not always, none waits when it ends.
            for _ in 0..25 {
                master.hup();
                asked.wait_answered(100);
            }
        });
        assert!(lost > 0, "the load shows nothing, the control loses nothing either");
        master.stop();
    });
}
