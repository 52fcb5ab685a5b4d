//! The log of the run before, if the machine was restarted and not switched off.

use core::slice;

use boot::{log, memory_map::MemoryMap, stick};

use crate::{
    Failure,
    alone::{Alone, MAPPED},
    console::{say, wait_for_key},
    files::Stick,
    memory,
};

/// How many of its last lines are shown if it cannot be saved.
const LINES: usize = 15;

/// Looks for a log, saves it on the stick, and lets people read that.
pub fn save(stick: &mut Stick, alone: &Alone) -> Result<(), Failure> {
    let buffer = memory::allocate("the log of the last run", log::BYTES)?;
    let Some(text) = find(alone, buffer)? else {
        return Ok(());
    };
    say(format_args!("saving the log of the last run"));
    match stick.write(stick::LOG, text) {
        Ok(()) => {
            erase(alone)?;
            say(format_args!("the log of the last run is on the stick: {}", stick::LOG));
        }
        Err(status) => {
            say(format_args!(
                "the log of the last run cannot be saved as {} ({status}); it ends so:",
                stick::LOG
            ));
            for line in last_lines(text) {
                say(format_args!("{}", line.escape_ascii()));
            }
        }
    }
    say(format_args!("press a key to start the hypervisor again"));
    wait_for_key();
    Ok(())
}

fn last_lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = |text| <[u8]>::split(text, |byte| *byte == b'\n');
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    lines(text).skip(lines(text).count().saturating_sub(LINES))
}

/// The first log in free memory, copied to `buffer`.
fn find<'a>(alone: &Alone, buffer: &'a mut [u8]) -> Result<Option<&'a [u8]>, Failure> {
    let regions = memory::regions()?;
    let found = alone.run(|| -> Result<_, Failure> {
        let map = MemoryMap::new(&regions)?;
        // SAFETY: this is done alone, with the memory map of now.
        let found = unsafe { areas(&map) }.find_map(|area| log::text(area));
        Ok(found.map(|text| {
            buffer[..text.len()].copy_from_slice(text);
            text.len()
        }))
    })?;
    Ok(found.map(|length| &buffer[..length]))
}

/// Makes sure that no log is found again: older ones neither, which can be where the ramdisk once was.
fn erase(alone: &Alone) -> Result<(), Failure> {
    let regions = memory::regions()?;
    alone.run(|| {
        let map = MemoryMap::new(&regions)?;
        // SAFETY: this is done alone, with the memory map of now.
        unsafe { areas(&map) }.filter(|area| log::text(area).is_some()).for_each(log::erase);
        Ok(())
    })
}

/// Where a log can be.
///
/// # Safety
///
/// 1. The loader is alone. 2. `map` is the memory map of now.
unsafe fn areas(map: &MemoryMap) -> impl Iterator<Item = &'static mut [u8]> {
    log::places(map, MAPPED.as_u64()).map(|at| {
        // SAFETY: 1. Free memory (2) below what is mapped when alone (1), and nobody uses it before
        // the firmware runs again. 2. Each is yielded once, and they do not overlap.
        unsafe { slice::from_raw_parts_mut(at as *mut u8, log::BYTES as usize) }
    })
}
