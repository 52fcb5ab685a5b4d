//! The event stream on COM2: one JSON object a line for every decision.
//!
//! What happens on an exit path is put into a ring of this CPU, unformatted, and written out when
//! the vCPU's turn is over or the ring is full. The time that this takes is its VM's: it is charged
//! to it, and the others have as much before its next turn.

use alloc::boxed::Box;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use sld::{MsrWrite, RealBit};
use vmx::instruction::now;
use vmx::run::AcReport;

use crate::serial;

/// Events that a ring holds.
const RING: usize = 256;

/// Numbers the lines.
static SEQUENCE: AtomicU64 = AtomicU64::new(0);

/// An event of an exit path.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// A guest raised #AC.
    Ac(AcReport),
    /// A guest wrote 0x33.
    TestCtrlWrite {
        /// What it wrote.
        value: u64,
        /// What came of it.
        result: MsrWrite,
    },
    /// The real bit was written.
    RealBit(RealBit),
}

#[derive(Debug, Clone, Copy)]
struct Record {
    tsc: u64,
    vm: Option<&'static str>,
    event: Event,
}

/// The events of one CPU that are not yet written out.
#[derive(Debug)]
pub struct Ring {
    cpu: u32,
    records: Box<ArrayVec<Record, RING>>,
}

impl Ring {
    /// An empty ring for the CPU with this index.
    pub fn new(cpu: u32) -> Self {
        Self { cpu, records: Box::new(ArrayVec::new()) }
    }

    /// Adds an event of `vm`, or of no VM.
    #[inline]
    pub fn push(&mut self, vm: Option<&'static str>, event: Event) {
        if self.records.is_full() {
            self.make_room();
        }
        self.records.push(Record { tsc: now(), vm, event });
    }

    /// Apart, so that the usual case saves no registers for it.
    #[cold]
    #[inline(never)]
    fn make_room(&mut self) {
        self.drain();
    }

    /// Writes all events out.
    pub fn drain(&mut self) {
        for record in self.records.drain(..) {
            line(record.tsc, self.cpu, |json| record.write(json));
        }
    }

    /// Writes an event out at once, after those that wait. `name` is the event's; `fields` adds to
    /// it.
    pub fn write(&mut self, name: &str, fields: impl FnOnce(&mut Object<'_>) -> fmt::Result) {
        self.drain();
        line(now(), self.cpu, |json| {
            json.text("event", name)?;
            fields(json)
        });
    }
}

/// Writes an event where there is no ring yet, or none to be trusted any more.
pub fn write_raw(name: &str, key: &str, text: &dyn fmt::Display) {
    line(now(), 0, |json| {
        json.text("event", name)?;
        json.text(key, text)
    });
}

fn line(tsc: u64, cpu: u32, fields: impl FnOnce(&mut Object<'_>) -> fmt::Result) {
    serial::EVENTS.with(|out| {
        let mut json = Object::open(out)?;
        json.number("seq", SEQUENCE.fetch_add(1, Ordering::Relaxed))?;
        json.number("tsc", tsc)?;
        json.number("cpu", cpu)?;
        fields(&mut json)?;
        json.close()?;
        out.write_str("\n")
    });
}

impl Record {
    fn write(&self, json: &mut Object<'_>) -> fmt::Result {
        json.text(
            "event",
            match self.event {
                Event::Ac(_) => "ac",
                Event::TestCtrlWrite { .. } => "test-ctrl-write",
                Event::RealBit(_) => "real-bit",
            },
        )?;
        if let Some(vm) = self.vm {
            json.text("vm", vm)?;
            json.number("vcpu", 0u32)?;
        }
        match self.event {
            Event::Ac(report) => {
                json.address("rip", report.rip)?;
                json.number("cpl", report.context.cpl)?;
                json.flag("am", report.context.cr0_am)?;
                json.flag("ac", report.context.eflags_ac)?;
                json.flag("virtual_bit", report.virtual_bit)?;
                json.flag("legacy", report.context.legacy())?;
                json.text("verdict", report.verdict)?;
                json.text("bytes", Hex(report.instruction.as_slice()))
            }
            Event::TestCtrlWrite { value, result } => {
                json.address("value", value)?;
                json.text("result", result)
            }
            Event::RealBit(RealBit { on, why }) => {
                json.flag("on", on)?;
                json.text("why", why)
            }
        }
    }
}

/// Bytes in hexadecimal.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A JSON object that is being written.
pub struct Object<'a> {
    out: &'a mut dyn Write,
    separator: &'static str,
}

impl<'a> Object<'a> {
    fn open(out: &'a mut dyn Write) -> Result<Self, fmt::Error> {
        out.write_str("{")?;
        Ok(Self { out, separator: "" })
    }

    fn close(self) -> fmt::Result {
        self.out.write_str("}")
    }

    fn key(&mut self, key: &str) -> fmt::Result {
        write!(self.out, "{}\"{key}\":", self.separator)?;
        self.separator = ",";
        Ok(())
    }

    /// A string.
    pub fn text(&mut self, key: &str, text: impl fmt::Display) -> fmt::Result {
        self.key(key)?;
        self.out.write_str("\"")?;
        write!(Escape(self.out), "{text}")?;
        self.out.write_str("\"")
    }

    /// A number.
    pub fn number(&mut self, key: &str, number: impl Into<u64>) -> fmt::Result {
        self.key(key)?;
        write!(self.out, "{}", number.into())
    }

    /// True or false.
    pub fn flag(&mut self, key: &str, flag: bool) -> fmt::Result {
        self.key(key)?;
        write!(self.out, "{flag}")
    }

    /// An address or another 64-bit value, as a string "0x…": JSON numbers lose bits.
    pub fn address(&mut self, key: &str, address: u64) -> fmt::Result {
        self.text(key, format_args!("{address:#x}"))
    }

    /// An object.
    pub fn object(
        &mut self,
        key: &str,
        fields: impl FnOnce(&mut Object<'_>) -> fmt::Result,
    ) -> fmt::Result {
        self.key(key)?;
        let mut inner = Object::open(self.out)?;
        fields(&mut inner)?;
        inner.close()
    }
}

/// Writes what is put in as the inside of a JSON string.
struct Escape<'a>(&'a mut dyn Write);

impl Write for Escape<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c {
            '"' | '\\' => write!(self.0, "\\{c}"),
            '\n' => self.0.write_str("\\n"),
            c if c.is_control() => write!(self.0, "\\u{:04x}", u32::from(c)),
            c => self.0.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sld::{AcContext, Verdict, Why};
    use std::string::String;
    use vmx::run::InstructionBytes;

    fn written(vm: Option<&'static str>, event: Event) -> String {
        let mut text = String::new();
        let mut json = Object::open(&mut text).unwrap();
        Record { tsc: 0, vm, event }.write(&mut json).unwrap();
        json.close().unwrap();
        text
    }

    #[test]
    fn events_have_their_fields() {
        let context = AcContext { cpl: 3, cr0_am: true, eflags_ac: false };
        let mut bytes = [0; 15];
        bytes[..2].copy_from_slice(&[0xf0, 0x01]);
        let report = AcReport {
            rip: 0x10_0000,
            context,
            virtual_bit: false,
            verdict: Verdict::Kill,
            instruction: InstructionBytes::new(bytes, 2),
        };
        assert_eq!(
            written(Some("a"), Event::Ac(report)),
            r#"{"event":"ac","vm":"a","vcpu":0,"rip":"0x100000","cpl":3,"am":true,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"kill","bytes":"f001"}"#
        );
        assert_eq!(
            written(None, Event::RealBit(RealBit { on: true, why: Why::Boot })),
            r#"{"event":"real-bit","on":true,"why":"boot"}"#
        );
        assert_eq!(
            written(Some("a"), Event::TestCtrlWrite { value: 1 << 29, result: MsrWrite::Stored }),
            r#"{"event":"test-ctrl-write","vm":"a","vcpu":0,"value":"0x20000000","result":"stored"}"#
        );
    }

    #[test]
    fn strings_are_escaped() {
        let mut text = String::new();
        write!(Escape(&mut text), "a\"b\\c\nd\u{1}").unwrap();
        assert_eq!(text, r#"a\"b\\c\nd\u0001"#);
    }
}
