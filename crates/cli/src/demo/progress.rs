//! What a person sees while a demo runs: a line for each step, and bars on a terminal.

use super::child::{Audience, Name};
use crate::json::Output;
use crate::units::{Rate, Size};
use airlift_core::Side;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Arc;

/// Shows the lines of all processes to a person; with `--json` it shows nothing.
pub(crate) struct Progress {
    output: Arc<Output>,
    bars: Option<Bars>,
}

struct Bars {
    all: MultiProgress,
    memory: Option<ProgressBar>,
    devices: BTreeMap<String, ProgressBar>,
    device_total: u64,
}

impl Progress {
    /// Bars only for a person on a terminal. `device_total`: bytes of one device's state.
    pub(crate) fn new(output: Arc<Output>, device_total: u64) -> Self {
        let wanted = !output.is_json() && std::io::stderr().is_terminal() && std::io::stdout().is_terminal();
        let bars = wanted.then(|| Bars {
            all: MultiProgress::new(),
            memory: None,
            devices: BTreeMap::new(),
            device_total,
        });
        Self { output, bars }
    }

    fn say(&self, text: &str) {
        match &self.bars {
            // Between the bars.
            Some(bars) => drop(bars.all.println(text)),
            None => self.output.say(text),
        }
    }

    fn phase(&mut self, name: &Name, value: &Value) {
        let at = value["at_ms"].as_f64().unwrap_or_default();
        let phase = value["phase"].as_str().unwrap_or_default();
        let Some(text) = phase_text(name.side, phase) else { return };
        self.say(&format!("{at:>8.0} ms  {text}"));
        let ended = (name.side == Side::Source && phase == "done") || phase == "running";
        if ended && let Some(bars) = &mut self.bars {
            bars.clear();
        }
    }
}

/// What a phase means, for a person; `None` for those that say nothing new.
fn phase_text(side: Side, phase: &str) -> Option<&'static str> {
    Some(match (side, phase) {
        (Side::Source, "negotiate") => "the two hosts compare what they have",
        (Side::Source, "setup") => "the source logs writes; devices begin to save while they run",
        (Side::Source, "precopy") => "memory and device data move while the guest runs",
        (Side::Source, "quiesce") => "the guest is paused; devices stop together",
        (Side::Source, "stop-copy") => "the rest of all data moves",
        (Side::Destination, "load") => "the destination's devices check what they have got",
        (Side::Source, "commit") => "everything is loaded; the source commits",
        (Side::Destination, "running") => "the destination starts devices and guest",
        _ => return None,
    })
}

impl Audience for Progress {
    fn line(&mut self, name: &Name, event: &str, value: &Value) {
        match event {
            "phase" => self.phase(name, value),
            "stalled" => {
                let cause = value["cause"].as_str().unwrap_or_default();
                self.say(&format!("{:>11}  not converging: {cause}", ""));
            }
            "degraded" => {
                let message = value["message"].as_str().unwrap_or_default();
                self.say(&format!("{:>11}  note: {message}", ""));
            }
            "failed" => {
                let message = value["failure"]["message"].as_str().unwrap_or_default();
                self.say(&format!("{:>11}  the {} fails: {message}", "", name.side));
                if let Some(bars) = &mut self.bars {
                    bars.clear();
                }
            }
            "progress" if name.side == Side::Source => {
                if let Some(bars) = &mut self.bars {
                    bars.update(value);
                }
            }
            _ => {}
        }
    }
}

impl Bars {
    fn update(&mut self, value: &Value) {
        let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or(0);
        let (total, dirty) = (number(value, "memory_total"), number(value, "memory_dirty"));
        if total > 0 {
            let bar = self.memory.get_or_insert_with(|| self.all.add(bar("memory", total)));
            // In the first round everything is still to be sent, and nothing counts as dirty yet.
            let first = number(value, "round") == 0;
            let sent = number(value, "memory_sent").min(total);
            bar.set_position(if first { sent } else { total.saturating_sub(dirty) });
            bar.set_message(format!(
                "round {}, {} left, {}",
                number(value, "round"),
                Size(dirty),
                Rate(number(value, "bandwidth"))
            ));
        }
        for device in value["devices"].as_array().into_iter().flatten() {
            let id = device["id"].as_str().unwrap_or_default();
            let bar =
                self.devices.entry(id.to_owned()).or_insert_with(|| self.all.add(bar(id, self.device_total)));
            let left = number(device, "initial_bytes").saturating_add(number(device, "dirty_bytes"));
            let sent = number(device, "bytes");
            bar.set_position(sent.min(self.device_total.saturating_sub(left)));
            let state = device["state"].as_str().unwrap_or_default();
            bar.set_message(format!("{state}, {} sent, {} left", Size(sent), Size(left)));
        }
    }

    fn clear(&mut self) {
        for bar in self.memory.take().into_iter().chain(std::mem::take(&mut self.devices).into_values()) {
            bar.finish_and_clear();
        }
    }
}

fn bar(name: &str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("  {prefix:<8} [{bar:30}] {percent:>3} %  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_prefix(name.to_owned())
}
