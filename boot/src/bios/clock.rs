//! The time of day, to date what is written (INT 1Ah).

use hadris_fs::{CivilDate, CivilTime, Clock, DateTime, NoClock};

use super::{Registers, call};

/// The time that the machine's clock shows, which is local time or UTC; as files are dated that have
/// no date if there is no clock that runs.
pub fn now() -> DateTime {
    read().unwrap_or_else(|| NoClock.now())
}

fn read() -> Option<DateTime> {
    let [century, year, month, day] = ask(0x04)?;
    let [hour, minute, second, _] = ask(0x02)?;
    let date = CivilDate::new(i32::from(century) * 100 + i32::from(year), month, day).ok()?;
    let time = CivilTime::new(hour, minute, second).ok()?;
    DateTime::from_civil(date, time, None).ok()
}

/// CH, CL, DH and DL of the date (function 4) or the time (function 2), which are decimal.
fn ask(function: u8) -> Option<[u8; 4]> {
    let mut registers = Registers { eax: u32::from(function) << 8, ..Registers::default() };
    // SAFETY: the services write no memory.
    unsafe { call(0x1a, &mut registers) };
    let [cl, ch, ..] = registers.ecx.to_le_bytes();
    let [dl, dh, ..] = registers.edx.to_le_bytes();
    let decimal = |byte: u8| (byte >> 4) * 10 + (byte & 0xf);
    (!registers.carry()).then(|| [ch, cl, dh, dl].map(decimal))
}
