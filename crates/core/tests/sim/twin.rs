//! Re-exec: a master that is written down as text and read again goes on as if nothing had happened. For a while the one
//! before goes on beside it, and both must say the same.

use crate::world::World;
use reuseportd_core::{Command, Event, Master, Time};

/// The image before.
pub(crate) struct Twin {
    master: Master,
    said: Vec<Command>,
    /// So many more events.
    left: u32,
}

pub(crate) fn written(master: &Master) -> String {
    serde_json::to_string(master).unwrap_or_else(|error| panic!("can't be written down: {error}"))
}

pub(crate) fn read(text: &str) -> Master {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("can't be read: {error}: {text}"))
}

impl World {
    /// The next image takes over.
    pub(crate) fn replace_image(&mut self) {
        self.trace(format_args!("-- re-exec"));
        let text = written(&self.master);
        let next = read(&text);
        assert_eq!(written(&next), text, "not the same when read again");
        let master = std::mem::replace(&mut self.master, next);
        self.twin = Some(Twin { master, said: Vec::new(), left: 50 });
        self.upkeep.tally.images += 1;
    }

    pub(crate) fn turn_twin(&mut self, event: &Event) {
        let Some(twin) = &mut self.twin else { return };
        twin.master.handle(event.clone(), Time(self.now));
        twin.said = std::iter::from_fn(|| twin.master.next_command()).collect();
    }

    pub(crate) fn compare_twin(&mut self, commands: &[Command]) {
        let Some(twin) = &mut self.twin else { return };
        assert_eq!(twin.said, commands, "the image before would have said something else");
        assert_eq!(twin.master.next_deadline(), self.master.next_deadline());
        twin.left -= 1;
        if twin.left == 0 {
            assert_eq!(written(&twin.master), written(&self.master), "the images have parted");
            self.twin = None;
        }
    }
}
