//! Service tokens: what a tenant's own gateways show, with their configuration ready to copy.

use leptos::{ev::SubmitEvent, prelude::*, task::spawn_local};
use quota_common::service_token::{CreateServiceToken, CreatedServiceToken, ServiceToken};

use crate::{
    api::{self, Failure},
    app::session,
    component::{
        Alert, CodeBlock, Confirm, Empty, Field, Head, Modal, Pager, Shape, Shown, Toasts, When,
        held, load_page, open_when_asked,
    },
    model::text::{Gateway, named},
};

#[component]
pub fn ServiceTokens() -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let loader = load_page(api::list_service_tokens);
    let creating = RwSignal::new(false);
    open_when_asked(creating);
    let made = RwSignal::new(None::<CreatedServiceToken>);
    let showing = RwSignal::new(false);
    let making = RwSignal::new(false);
    let done = Callback::new(move |token: CreatedServiceToken| {
        made.set(Some(token));
        showing.set(true);
        loader.reload();
    });
    let deleting = RwSignal::new(None::<ServiceToken>);
    let asking = RwSignal::new(false);
    let busy = RwSignal::new(false);
    let failure = RwSignal::new(None::<String>);
    let may = move || {
        session()
            .me
            .get()
            .is_some_and(|me| me.tenant.role.may_manage())
    };
    let run = Callback::new(move |()| {
        let Some(token) = deleting.get_untracked() else {
            return;
        };
        busy.set(true);
        spawn_local(async move {
            match api::delete_service_token(token.id).await {
                Ok(()) => {
                    asking.set(false);
                    toasts.say(format!(
                        "The service token {} is deleted.",
                        named(&token.name)
                    ));
                    loader.reload();
                }
                Err(refused) => failure.set(Some(refused.text())),
            }
            busy.set(false);
        });
    });
    view! {
        <Head title="Service tokens" about="What your own gateways show to ask whether a request may pass.">
            {move || may().then(|| view! { <button class="button first" on:click=move |_| creating.set(true)>"New token"</button> })}
        </Head>
        <Shown
            loader
            show=move |page| {
                if page.items.is_empty() {
                    return view! {
                        <Empty shape=Shape::Token title="No service tokens yet" about="Make one for each gateway: it comes with the configuration of Caddy, nginx, HAProxy or Traefik.">
                            <button class="button first" on:click=move |_| creating.set(true)>"Make the first token"</button>
                        </Empty>
                    }
                        .into_any();
                }
                let shown = page.items.len();
                view! {
                    <table class="table">
                        <caption class="unseen">"Service tokens, newest first"</caption>
                        <thead>
                            <tr>
                                <th scope="col">"Name"</th>
                                <th scope="col">"Token"</th>
                                <th scope="col">"Last used"</th>
                                <th scope="col">"Made"</th>
                                <th scope="col"><span class="unseen">"Actions"</span></th>
                            </tr>
                        </thead>
                        <tbody>
                            {page
                                .items
                                .into_iter()
                                .map(|token| {
                                    let label = format!("Delete {}", token.name);
                                    let it = token.clone();
                                    view! {
                                        <tr>
                                            <th scope="row" dir="auto"><span class="clamp">{token.name.clone()}</span></th>
                                            <td data-label="Token"><code>{token.prefix.clone()}"…"</code></td>
                                            <td data-label="Last used">
                                                {match token.last_used_at {
                                                    Some(at) => view! { <When at/> }.into_any(),
                                                    None => view! { <span class="quiet">"unused"</span> }.into_any(),
                                                }}
                                            </td>
                                            <td data-label="Made"><When at=token.created_at/></td>
                                            <td class="row-actions">
                                                {may()
                                                    .then(|| {
                                                        view! {
                                                            <button
                                                                class="button small"
                                                                aria-label=label
                                                                on:click=move |_| {
                                                                    failure.set(None);
                                                                    deleting.set(Some(it.clone()));
                                                                    asking.set(true);
                                                                }
                                                            >
                                                                "Delete"
                                                            </button>
                                                        }
                                                    })}
                                            </td>
                                        </tr>
                                    }
                                })
                                .collect_view()}
                        </tbody>
                    </table>
                    <Pager total=page.total shown next=page.next_cursor/>
                }
                    .into_any()
            }
        />
        <section class="card" aria-labelledby="gateways">
            <h2 id="gateways">"Configure a gateway"</h2>
            <Configuration token="qs_…"/>
        </section>
        <Modal open=creating title="New service token" firm=making>
            <CreateForm open=creating busy=making done/>
        </Modal>
        <TextOnce made open=showing/>
        <Confirm
            open=asking
            title=Signal::derive(move || format!("Delete {}?", deleting.get().map(|it| named(&it.name)).unwrap_or_default()))
            breaks="Within a second the gateway that shows it is answered with 401, and lets nobody through."
            action="Delete token"
            busy
            failure
            run
        />
    }
}

/// The configuration of each gateway, one at a time.
#[component]
fn Configuration(#[prop(into)] token: Signal<String>) -> impl IntoView {
    let chosen = RwSignal::new(Gateway::Caddy);
    let text = Signal::derive(move || chosen.get().configuration(&api::origin(), &token.get()));
    view! {
        <fieldset class="choice">
            <legend class="unseen">"Gateway"</legend>
            {Gateway::ALL
                .into_iter()
                .map(|gateway| {
                    view! {
                        <button
                            type="button"
                            class="button small"
                            aria-pressed=move || (chosen.get() == gateway).to_string()
                            on:click=move |_| chosen.set(gateway)
                        >
                            {gateway.name()}
                        </button>
                    }
                })
                .collect_view()}
        </fieldset>
        <CodeBlock text what="the configuration"/>
    }
}

#[component]
fn CreateForm(
    open: RwSignal<bool>,
    busy: RwSignal<bool>,
    done: Callback<CreatedServiceToken>,
) -> impl IntoView {
    let name = RwSignal::new(String::new());
    let failure = RwSignal::new(None::<Failure>);
    let rest = Signal::derive(move || {
        let failure = failure.get()?;
        (!failure.names_fields()).then(|| failure.text())
    });
    let submit = move |ev: SubmitEvent| {
        ev.prevent_default();
        busy.set(true);
        failure.set(None);
        let body = CreateServiceToken {
            name: name.get_untracked().into(),
        };
        spawn_local(async move {
            let answer = api::create_service_token(body).await;
            let _ = busy.try_set(false);
            match answer {
                Ok(made) => {
                    let _ = open.try_set(false);
                    let _ = done.try_run(made);
                }
                Err(refused) => {
                    let _ = failure.try_set(Some(refused));
                }
            }
        });
    };
    view! {
        <form on:submit=submit>
            <Alert text=rest/>
            <Field
                id="token_name"
                label="Name"
                value=name
                required=true
                hint="The gateway that will hold it."
                error=Signal::derive(move || failure.get()?.of_field("name"))
            />
            <div class="actions end">
                <button type="button" class="button" aria-disabled=held(busy) on:click=move |_| open.set(false)>"Cancel"</button>
                <button class="button first" aria-disabled=held(busy)>"Make token"</button>
            </div>
        </form>
    }
}

/// A token's text, for the only time.
#[component]
fn TextOnce(made: RwSignal<Option<CreatedServiceToken>>, open: RwSignal<bool>) -> impl IntoView {
    let stored = RwSignal::new(false);
    Effect::new(move |_| {
        if open.get() {
            stored.set(false);
        }
    });
    let text = Signal::derive(move || made.get().and_then(|it| it.token).unwrap_or_default());
    let name = move || {
        made.get()
            .map(|it| it.service_token.name)
            .unwrap_or_default()
    };
    view! {
        <Modal open firm=true wide=true title=Signal::derive(move || format!("The token of {}", named(&name())))>
            <p>"This is the only time it is shown. It is stored nowhere."</p>
            <CodeBlock id="token-text" text what="the token"/>
            <h3>"Configure a gateway"</h3>
            <Configuration token=text/>
            <div class="actions end gate">
                <label class="check">
                    <input type="checkbox" name="stored" bind:checked=stored/>
                    <span>"I stored it"</span>
                </label>
                <button
                    class="button first"
                    disabled=move || !stored.get()
                    on:click=move |_| {
                        open.set(false);
                        made.set(None);
                    }
                >
                    "Done"
                </button>
            </div>
        </Modal>
    }
}
